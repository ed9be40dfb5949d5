// One plot a panel (PANELS in ../page.py says which); all share the cursor and the range of steps.
(() => {
  const { runs, panels } = DATA;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const STEPS = [...new Set(runs.flatMap((run) => run.steps))].sort((a, b) => a - b);
  const places = runs.map((run) => new Map(run.steps.map((step, i) => [step, i])));
  const plots = [];
  const WHOLE = [1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 1e4, 2.5e4, 5e4, 1e5, 1e6];
  const DASHES = [[], [6, 4], [2, 3]];
  const smooth = byId("smooth"), from = byId("from"), to = byId("to");

  const column = (r, name) => STEPS.map((step) => {
    const at = places[r].get(step);
    return at === undefined ? null : runs[r].metrics[name]?.[at] ?? null;
  });

  function mean(values, span) {
    const out = [];
    for (let i = 0; i < values.length; i++) {
      let sum = 0, count = 0;
      for (let j = Math.max(0, i - span + 1); j <= i; j++) if (values[j] !== null) { sum += values[j]; count++; }
      out.push(values[i] === null || !count ? null : sum / count);
    }
    return out;
  }

  function linesOf(panel) {
    const lines = [];
    runs.forEach((run, r) => panel.names.forEach((name, n) => {
      let values = column(r, name);
      if (panel.log) values = values.map((v) => (v !== null && v > 0 ? v : null));
      const count = values.filter((v) => v !== null).length;
      if (!count) return;
      const label = panel.names.length > 1 ? panel.labels[n] : "";
      lines.push({
        values,
        sparse: count < run.steps.length / 2,
        colour: `--s${1 + ((runs.length > 1 ? r : n) % 6)}`,
        dash: runs.length > 1 ? DASHES[n % 3] : [],
        label: [runs.length > 1 ? run.name : "", label].filter(Boolean).join(" ") || "value",
      });
    }));
    return lines;
  }

  const rows = (lines, span) => [STEPS, ...lines.flatMap((l) => [l.values, l.sparse ? l.values : mean(l.values, span)])];

  function decades(u, which, low, high) {
    const [first, last] = [low, high].map((v) => Math.round(Math.log10(v)));
    const every = Math.ceil((last - first + 1) / 6);
    return Array.from({ length: Math.floor((last - first) / every) + 1 }, (_, i) => 10 ** (first + i * every));
  }

  function axis(panel, vertical) {
    return {
      stroke: () => colour("--muted"), font: "11px system-ui, sans-serif", size: vertical ? 50 : 26, gap: 4,
      grid: { stroke: () => colour("--grid"), width: 1 }, ticks: { show: false },
      ...(vertical ? { values: (u, marks) => marks.map((v) => (v === null ? "" : digits(v))), space: 28 } : { space: 60, incrs: WHOLE }),
      ...(vertical && panel.log ? { splits: decades, filter: (u, marks) => marks } : {}),
    };
  }

  function range(panel) {
    const share = /^(Accuracy|Format|Groups without spread)$/.test(panel.title);
    return (u, low, high) => {
      if (low === null) return panel.log ? [0.1, 1] : [0, 1];
      if (panel.log) return [10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high * 1.0001))];
      if (share) return [0, 1.03];
      if (low === high) return [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
      return uPlot.rangeNum(low, high, 0.08, true);
    };
  }

  function addPanel(panel, parent) {
    const lines = linesOf(panel);
    const at = make("span", { class: "at" });
    const values = make("ul", { class: "values" });
    const unit = [panel.unit, panel.log ? "log" : ""].filter(Boolean).join(", ");
    const title = make("h3", {}, panel.title, " ", make("span", { class: "unit" }, unit));
    const plot = make("div", {
      class: "plot", tabindex: "0", role: "slider", "aria-label": `${panel.title}: step`,
      "aria-valuemin": STEPS[0], "aria-valuemax": STEPS.at(-1), "aria-valuenow": STEPS.at(-1),
    });
    const box = make("div", { class: "panel" }, make("header", {}, title, at), values, plot);
    if (panel.advice.length) {
      const notes = panel.advice.map(([name, meaning, advice]) =>
        make("p", {}, make("code", {}, name), `: ${meaning}. ${advice}`));
      box.append(make("details", {}, make("summary", {}, "What to look for"), ...notes));
    }
    parent.append(box);
    const outputs = lines.map((line) => {
      const figure = make("b");
      const chip = make("span", { class: "chip" });
      chip.style.background = `var(${line.colour})`;
      values.append(make("li", {}, chip, line.label === "value" ? "" : `${line.label} `, figure));
      return figure;
    });
    const raw = (line) => ({
      stroke: () => colour(line.colour), width: 1, alpha: 0.35, spanGaps: line.sparse,
      points: { show: line.sparse || undefined, size: 5, fill: () => colour(line.colour) },
    });
    const smoothed = (line) => ({
      stroke: () => colour(line.colour), width: 2, dash: line.dash, spanGaps: line.sparse,
      points: { show: line.sparse || STEPS.length < 12, size: 5, fill: () => colour(line.colour) },
    });
    function tell(u) {
      const index = u.cursor.idx ?? null;
      const texts = lines.map((line, i) => {
        const data = line.values;
        const value = index === null ? data.findLast((v) => v !== null) : data[index];
        outputs[i].textContent = digits(value);
        return `${line.label} ${digits(value)}`;
      });
      const step = index === null ? STEPS.at(-1) : STEPS[index];
      at.textContent = `step ${step}`;
      plot.setAttribute("aria-valuenow", step);
      plot.setAttribute("aria-valuetext", `step ${step}: ${texts.join(", ")}`);
    }
    const u = new uPlot({
      width: Math.max(plot.clientWidth, 200), height: 180, padding: [8, 14, 0, 0], legend: { show: false },
      cursor: { y: false, drag: { x: true, y: false }, sync: { key: "steps" }, points: { size: 6 } },
      scales: { x: { time: false }, y: { distr: panel.log ? 3 : 1, range: range(panel) } },
      axes: [axis(panel, false), axis(panel, true)],
      series: [{}, ...lines.flatMap((line) => [raw(line), smoothed(line)])],
      hooks: { setCursor: [tell], setScale: [(u, key) => key === "x" && plots[0]?.u === u && showRange(u)] },
    }, rows(lines, +smooth.value), plot);
    plot.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
      const now = u.cursor.idx ?? STEPS.length - 1;
      let next = now + (moves[event.key] ?? 0);
      if (event.key === "Home") next = 0;
      else if (event.key === "End") next = STEPS.length - 1;
      else if (!(event.key in moves)) return;
      event.preventDefault();
      next = Math.min(Math.max(next, 0), STEPS.length - 1);
      for (const each of plots) each.u.setCursor({ left: each.u.valToPos(STEPS[next], "x"), top: 10 });
    });
    new ResizeObserver(() => plot.clientWidth && u.setSize({ width: plot.clientWidth, height: 180 })).observe(plot);
    plots.push({ u, lines });
    tell(u);
  }

  function showRange(u) {
    from.value = Math.max(STEPS[0], Math.ceil(u.scales.x.min));
    to.value = Math.min(STEPS.at(-1), Math.floor(u.scales.x.max));
  }

  function zoom(min, max) {
    if (min < max) for (const { u } of plots) u.setScale("x", { min, max });
  }

  function nameSmoothing() {
    byId("smooth-value").textContent = smooth.value === "1" ? "none" : `mean of ${smooth.value} steps`;
  }

  function applySmoothing() {
    const span = +smooth.value;
    nameSmoothing();
    for (const { u, lines } of plots) u.setData(rows(lines, span), false), u.redraw();
  }

  if (runs.length > 1) runs.forEach((run, r) => {
    const chip = make("span", { class: "chip" });
    chip.style.background = `var(--s${1 + (r % 6)})`;
    byId("run-legend").append(make("li", {}, chip, run.name));
  });
  smooth.max = String(Math.max(2, Math.min(100, Math.floor(STEPS.length / 2))));
  smooth.value = String(STEPS.length < 20 ? 1 : Math.max(2, Math.round(STEPS.length / 20)));
  for (const panel of panels.filter((p) => p.main)) addPanel(panel, byId("panels"));
  nameSmoothing();
  [from.value, to.value] = [STEPS[0], STEPS.at(-1)];
  const more = byId("more"), rest = panels.filter((p) => !p.main);
  if (!rest.length) more.remove();
  else more.addEventListener("toggle", () => { for (const panel of rest) addPanel(panel, byId("more-panels")); }, { once: true });
  smooth.addEventListener("input", applySmoothing);
  for (const input of [from, to]) {
    [input.min, input.max] = [STEPS[0], STEPS.at(-1)];
    input.addEventListener("change", () => zoom(+from.value, +to.value));
  }
  byId("whole").addEventListener("click", () => zoom(STEPS[0], STEPS.at(-1)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach(({ u }) => u.redraw(false)));
})();
