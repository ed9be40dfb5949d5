// One plot a panel (PANELS in ../page.py says which); all share the cursor and the range of the axis below.
(() => {
  const { runs, panels } = DATA;
  const several = runs.length > 1;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colourOf = (r) => `--s${1 + (r % 6)}`;
  const WHOLE = [1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 1e4, 2.5e4, 5e4, 1e5, 1e6];
  const DASHES = [[], [6, 4], [2, 3]];
  const smooth = byId("smooth"), from = byId("from"), to = byId("to"), more = byId("more");
  const longest = Math.max(...runs.map((run) => run.steps.length));

  // ------------------------------------------------------------------------------------------------- the axis below
  // Where a step of a run lies on the axis, and what a place on it is called.
  const stepAxis = { unit: "Steps", at: (run, step) => step, name: (x) => `step ${x}` };
  const AXES = {
    steps: stepAxis,
    // the evaluation of the start model, step 0, has no logarithm: it stands at a half
    log: { ...stepAxis, log: true, at: (run, step) => step || 0.5, name: (x) => `step ${x < 1 ? 0 : x}` },
    share: { unit: "% of the run", at: (run, step) => (100 * step) / run.steps.at(-1), name: (x) => `${digits(x)} % of the run` },
  };
  let axis, grid, places;  // the axis, all places on it, and where on the grid each step of each run is

  function useAxis(name) {
    axis = AXES[name];
    const own = runs.map((run) => run.steps.map((step) => axis.at(run, step)));
    grid = [...new Set(own.flat())].sort((a, b) => a - b);
    const index = new Map(grid.map((x, i) => [x, i]));
    places = own.map((xs) => xs.map((x) => index.get(x)));
    byId("unit").textContent = axis.unit;
    for (const input of [from, to]) [input.min, input.max] = [grid[0], grid.at(-1)];
  }

  function onGrid(r, values) {
    const out = Array(grid.length).fill(null);
    values.forEach((value, i) => { out[places[r][i]] = value; });
    return out;
  }

  // ---------------------------------------------------------------------------------------------------------- lines
  function mean(values, span) {
    return values.map((value, i) => {
      if (value === null) return null;
      const window = values.slice(Math.max(0, i - span + 1), i + 1).filter((v) => v !== null);
      return window.reduce((sum, v) => sum + v, 0) / window.length;
    });
  }

  function linesOf(panel) {
    const lines = [];
    runs.forEach((run, r) => panel.names.forEach((name, n) => {
      let values = run.metrics[name] ?? run.steps.map(() => null);
      if (panel.log) values = values.map((v) => (v > 1e-15 ? v : null));
      const count = values.filter((v) => v !== null).length;
      if (!count) return;
      lines.push({
        r, values,
        shown: onGrid(r, values),
        sparse: count < run.steps.length / 2,
        colour: colourOf(several ? r : n),
        dash: DASHES[several ? n % 3 : 0],
        label: [several ? run.name : "", panel.names.length > 1 ? panel.labels[n] : ""].filter(Boolean).join(" "),
      });
    }));
    return lines;
  }

  // Each line twice: as it is, pale, and smoothed.
  const rows = (lines) => [grid, ...lines.flatMap((l) => [l.shown, l.sparse ? l.shown : onGrid(l.r, mean(l.values, +smooth.value))])];

  function seriesOf(line) {
    const common = { stroke: () => colour(line.colour), spanGaps: line.sparse || several };
    const points = { size: 5, fill: () => colour(line.colour) };
    return [
      { ...common, width: 1, alpha: 0.35, points: { ...points, show: line.sparse || undefined } },
      { ...common, width: 2, dash: line.dash, points: { ...points, show: line.sparse || longest < 12 } },
    ];
  }

  // ----------------------------------------------------------------------------------------------------------- axes
  function decades(u, which, low, high) {
    const [first, last] = [low, high].map((v) => Math.round(Math.log10(v)));
    const every = Math.ceil((last - first + 1) / 6);
    return Array.from({ length: Math.floor((last - first) / every) + 1 }, (_, i) => 10 ** (first + i * every));
  }

  const axisStyle = () => ({
    stroke: () => colour("--muted"), font: "11px system-ui, sans-serif", gap: 4,
    grid: { stroke: () => colour("--grid"), width: 1 }, ticks: { show: false },
  });
  const marks = (u, values) => values.map((v) => (v === null ? "" : digits(v)));
  const steps = (u, values) => marks(u, values.map((v) => (v < 1 ? null : v)));

  const below = () => ({ ...axisStyle(), size: 26, space: 60, ...(axis.log ? { values: steps } : { incrs: WHOLE }) });

  const beside = (panel) => ({
    ...axisStyle(), size: 50, space: 28, values: marks,
    ...(panel.log ? { splits: decades, filter: (u, splits) => splits } : {}),
  });

  function range(panel, low, high) {
    if (low === null) return panel.log ? [0.1, 1] : [0, 1];
    if (panel.log) return [10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high * 1.0001))];
    if (panel.full) return [0, 1.03];
    const size = Math.max(Math.abs(low), Math.abs(high));
    if (size < 1e-12) return [0, 1];  // nothing but zeros
    if (high - low < 1e-6 * size) return [low - 0.1 * size, high + 0.1 * size];
    return uPlot.rangeNum(low, high, 0.08, true);
  }

  // A dashed line where a session of a resumed run begins.
  function drawSessions(u) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.setLineDash([4, 4]);
    runs.forEach((run, r) => run.resumed.forEach((step) => {
      const x = u.valToPos(axis.at(run, step), "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) return;
      ctx.strokeStyle = colour(several ? colourOf(r) : "--muted");
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }));
    ctx.restore();
  }

  // ---------------------------------------------------------------------------------------------------------- panels
  const plots = [];

  function makePlot(panel, lines, parent, tell) {
    return new uPlot({
      width: Math.max(parent.clientWidth, 200), height: 180, padding: [8, 14, 0, 0], legend: { show: false },
      cursor: { y: false, drag: { x: true, y: false }, sync: { key: "steps" }, points: { size: 6 } },
      scales: {
        x: { time: false, ...(axis.log ? { distr: 3, range: (u, low, high) => [low, high] } : {}) },  // not whole decades
        y: { distr: panel.log ? 3 : 1, range: (u, low, high) => range(panel, low, high) },
      },
      axes: [below(), beside(panel)],
      series: [{}, ...lines.flatMap(seriesOf)],
      hooks: { setCursor: [tell], setScale: [(u, key) => key === "x" && plots[0]?.u === u && showRange(u)], drawAxes: [drawSessions] },
    }, rows(lines), parent);
  }

  // On the axis of shares a run has no value at most places: its last one counts.
  function valueAt(line, index) {
    if (index === null) return line.shown.findLast((v) => v !== null);
    return axis === AXES.share ? line.shown.slice(0, index + 1).findLast((v) => v !== null) : line.shown[index];
  }

  function chip(name, dash = []) {
    const mark = make("span", { class: "chip" });
    mark.style.borderTop = `0.2em ${["solid", "dashed", "dotted"][Math.max(0, DASHES.indexOf(dash))]} var(${name})`;
    return mark;
  }

  function addPanel(panel, parent) {
    const lines = linesOf(panel);
    const at = make("span", { class: "at" });
    const unit = [panel.unit, panel.log ? "log" : ""].filter(Boolean).join(", ");
    const title = show(make("h3"), panel.title);
    title.append(" ", make("span", { class: "unit" }, unit));
    const plot = make("div", {
      class: "plot", tabindex: "0", role: "slider", "aria-label": `${panel.title}: step`,
      "aria-valuemin": grid[0], "aria-valuemax": grid.at(-1), "aria-valuenow": grid.at(-1),
    });
    const figures = lines.map(() => make("b"));
    const values = make("ul", { class: "values" }, ...lines.map((line, i) =>
      make("li", {}, chip(line.colour, line.dash), show(make("span"), line.label && `${line.label} `), figures[i])));
    parent.append(make("div", { class: "panel" }, make("header", {}, title, at), values, plot, ...advice(panel)));
    const u = makePlot(panel, lines, plot, tell);
    function tell({ cursor }) {
      const index = cursor.idx ?? null, x = index === null ? grid.at(-1) : grid[index];
      const texts = lines.map((line) => digits(valueAt(line, index)));
      texts.forEach((text, i) => { figures[i].textContent = text; });
      at.textContent = axis.name(x);
      plot.setAttribute("aria-valuenow", x);
      plot.setAttribute("aria-valuetext", `${axis.name(x)}: ${lines.map((line, i) => `${line.label || "value"} ${texts[i]}`).join(", ")}`);
    }
    plot.addEventListener("keydown", (event) => moveCursor(event, u));
    new ResizeObserver(() => plot.clientWidth && u.setSize({ width: plot.clientWidth, height: 180 })).observe(plot);
    plots.push({ u, lines });
    tell(u);
  }

  function advice(panel) {
    if (!panel.advice.length) return [];
    const parts = (text) => text.split(/(--\w+)/).map((part, i) => (i % 2 ? make("code", { class: "flag" }, part) : part));
    const notes = panel.advice.map(([name, meaning, what]) => make("p", {}, show(make("code"), name), ...parts(`: ${meaning}. ${what}`)));
    return [make("details", {}, make("summary", {}, "What to look for"), ...notes)];
  }

  function moveCursor(event, u) {
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
    const last = grid.length - 1;
    let next = (u.cursor.idx ?? last) + (moves[event.key] ?? 0);
    if (event.key === "Home") next = 0;
    else if (event.key === "End") next = last;
    else if (!(event.key in moves)) return;
    event.preventDefault();
    next = Math.min(Math.max(next, 0), last);
    for (const each of plots) each.u.setCursor({ left: each.u.valToPos(grid[next], "x"), top: 10 });
  }

  // -------------------------------------------------------------------------------------------------------- controls
  function showRange(u) {
    from.value = Math.max(Math.floor(grid[0]), Math.ceil(u.scales.x.min));
    to.value = Math.min(grid.at(-1), Math.floor(u.scales.x.max));
  }

  function zoom(first, last) {
    const [min, max] = [Math.max(first, grid[0]), Math.min(last, grid.at(-1))];
    if (min < max) for (const { u } of plots) u.setScale("x", { min, max });
  }

  function nameSmoothing() {
    byId("smooth-value").textContent = smooth.value === "1" ? "none" : `mean of ${smooth.value} steps`;
  }

  function applySmoothing() {
    nameSmoothing();
    for (const { u, lines } of plots) u.setData(rows(lines), false), u.redraw();
  }

  function addMore() {
    if (!more.open || byId("more-panels").children.length) return;
    for (const panel of panels.filter((p) => !p.main)) addPanel(panel, byId("more-panels"));
  }

  function build(name) {
    plots.splice(0).forEach(({ u }) => u.destroy());
    for (const id of ["panels", "more-panels"]) byId(id).replaceChildren();
    useAxis(name);
    for (const panel of panels.filter((p) => p.main)) addPanel(panel, byId("panels"));
    addMore();
    [from.value, to.value] = [Math.floor(grid[0]), grid.at(-1)];
  }

  if (several) runs.forEach((run, r) => byId("run-legend").append(show(make("li", {}, chip(colourOf(r))), run.name)));
  else byId("axis").querySelector("[value=share]").remove();
  smooth.max = String(Math.max(2, Math.min(100, Math.floor(longest / 2))));
  smooth.value = String(longest < 20 ? 1 : Math.max(2, Math.round(longest / 20)));
  nameSmoothing();
  build("steps");
  if (panels.every((p) => p.main)) more.remove();
  else more.addEventListener("toggle", addMore);
  byId("axis").addEventListener("change", (event) => build(event.target.value));
  smooth.addEventListener("input", applySmoothing);
  for (const input of [from, to]) input.addEventListener("change", () => zoom(+from.value, +to.value));
  byId("whole").addEventListener("click", () => zoom(grid[0], grid.at(-1)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach(({ u }) => u.redraw(false)));
})();
