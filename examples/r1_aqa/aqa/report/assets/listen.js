// The listening page: a list of groups (a question with its responses), and the chosen one with its clip.
// A group is a held-out question with the answers of several rounds, or a prompt of a step with sampled responses.
(() => {
  const { groups, clips, pairs } = DATA;
  if (!groups.length) return;
  const list = byId("list"), article = byId("group"), sets = byId("set"), types = byId("type"), steps = byId("step");
  // value, label, and whether a response that the filters look at fits
  const FILTERS = [
    ["all", "all", () => true],
    ["right", "right", (r) => r.right === true],
    ["wrong", "wrong", (r) => r.right === false],
    ["form", "out of format", (r) => r.form === false],
    ["gained", "became right", (r, group) => group.outcome === "became right"],
    ["lost", "became wrong", (r, group) => group.outcome === "became wrong"],
  ];
  let test = FILTERS[0][2];
  let pair = null;  // the mistake that is shown alone
  let shown = [];
  let chosen = null;

  const fits = (r, group) => r.main && test(r, group);
  const inSet = () => groups.filter((group) => group.set === +sets.value);

  // ------------------------------------------------------------------------------------------------------- filters
  function addFilters() {
    for (const [value, label] of FILTERS) {
      const radio = make("input", { type: "radio", name: "kind", value });
      radio.checked = value === "all";
      radio.addEventListener("change", () => { test = FILTERS.find((filter) => filter[0] === value)[2]; filter(); });
      byId("kinds").append(make("label", {}, radio, label, " ", make("span", { class: "count" })));
    }
  }

  function options(select, label, values) {
    select.replaceChildren(make("option", { value: "" }, "all"), ...values.map((value, i) => make("option", { value: i }, String(value))));
    select.values = values;
    label.hidden = values.length < 2;
  }

  const selected = (select) => (select.value === "" ? null : select.values[+select.value]);

  const countOf = (fit, among) => among.reduce((sum, group) => sum + group.responses.filter((r) => r.main && fit(r, group)).length, 0);

  // Another set: the filters that it has.
  function openSet() {
    const here = inSet();
    options(types, byId("type-label"), [...new Set(here.map((group) => group.kind).filter(Boolean))].sort());
    options(steps, byId("step-label"), [...new Set(here.map((group) => group.step).filter((step) => step !== null))]);
    byId("kinds").querySelectorAll("label").forEach((label, i) => {
      const [value, , fit] = FILTERS[i];
      label.hidden = !countOf(fit, here) && (value === "gained" || value === "lost" || value === "form");
      if (label.hidden && label.querySelector("input").checked) reset();
    });
    showPair(null);
  }

  function reset() {
    byId("kinds").querySelector("input").checked = true;
    test = FILTERS[0][2];
  }

  function isPair(group, { kind, gold, said }) {
    return group.kind === kind && group.gold === gold && group.responses.some((r) => r.main && !r.right && r.said === said);
  }

  function showPair(mistake) {
    pair = mistake;
    const button = byId("pair");
    button.hidden = !mistake;
    button.replaceChildren();
    if (mistake) show(button, `${mistake.gold}, answered ${mistake.said} ✕`);
    filter();
  }

  // The buttons in the table of mistakes lead to the questions that were answered so, as far as the page has them.
  function connectPairs() {
    for (const button of document.querySelectorAll("button.pair")) {
      const mistake = pairs[+button.dataset.set][+button.dataset.pair];
      const set = +button.dataset.set;
      button.hidden = !groups.some((group) => group.set === set && isPair(group, mistake));
      button.addEventListener("click", () => {
        sets.value = set;
        reset();
        openSet();
        showPair(mistake);
        byId("listen").scrollIntoView();
        article.querySelector("[aria-label='Next question']")?.focus({ preventScroll: true });
      });
    }
  }

  function filter() {
    const type = selected(types), step = selected(steps);
    const here = inSet().filter((group) => (type === null || group.kind === type) && (step === null || group.step === step)
      && (!pair || isPair(group, pair)));
    byId("kinds").querySelectorAll(".count").forEach((count, i) => { count.textContent = countOf(FILTERS[i][2], here); });
    shown = here.filter((group) => group.responses.some((r) => fits(r, group)));
    list.replaceChildren(...shown.map(entry));
    if (shown.length) return choose(shown.includes(chosen) ? chosen : shown[0]);
    list.append(make("p", { class: "empty" }, "No question fits the filter."));
    article.replaceChildren(make("p", { class: "empty" }, "Nothing to show."));
    PLAYER.stop();
    chosen = null;
  }

  // ---------------------------------------------------------------------------------------------------------- list
  const nameOf = (group) => (group.step === null ? `Question ${group.number + 1}` : `Step ${group.step}, group ${group.number + 1}`);

  function tally(group) {
    if (group.outcome) return group.outcome;
    const { length } = group.responses;
    if (group.responses.every((r) => r.right === null)) return `${length} responses`;
    return `${group.responses.filter((r) => r.right).length} of ${length} right`;
  }

  function entry(group) {
    const pips = make("span", { class: "pips", "aria-hidden": "true" },
      ...group.responses.map((r) => make("span", { class: `pip${r.right ? " right" : ""}${r.form === false ? " off" : ""}` })));
    if (group.outcome) pips.append(make("span", { class: "note" }, tally(group)));
    const button = make("button", { type: "button" },
      make("span", { class: "where" }, group.step === null ? `${group.number + 1}` : `step ${group.step} · ${group.number + 1}`),
      show(make("span", { class: "gold" }), group.gold), pips,
      make("span", { class: "hidden" }, `, ${tally(group)}`));
    button.addEventListener("click", () => choose(group));
    return button;
  }

  function choose(group, focus = false) {
    const at = shown.indexOf(group);
    [...list.children].forEach((button, i) => {
      if (i === at) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    });
    const button = list.children[at];
    const below = button.offsetTop;
    if (below < list.scrollTop || below + button.offsetHeight > list.scrollTop + list.clientHeight) {
      list.scrollTop = below - list.clientHeight / 2 + button.offsetHeight / 2;
    }
    if (focus && list.contains(document.activeElement)) button.focus();
    chosen = group;
    article.replaceChildren(top(group, at), heard(group), responses(group));
  }

  function move(by) {
    if (!shown.length) return;
    const next = Math.min(Math.max(shown.indexOf(chosen) + by, 0), shown.length - 1);
    if (shown[next] !== chosen) choose(shown[next], true);
  }

  // ----------------------------------------------------------------------------------------------- the chosen group
  function mover(label, text, by, end) {
    const button = make("button", { type: "button", "aria-label": label, "aria-disabled": end }, text);  // not disabled, which would lose the focus
    button.addEventListener("click", () => { move(by); article.querySelector(`[aria-label='${label}']`).focus(); });
    return button;
  }

  function top(group, at) {
    byId("say").textContent = `${nameOf(group)}: ${tally(group)}`;
    const about = [group.kind, tally(group), `${at + 1} of ${shown.length} shown`].filter(Boolean).join(" · ");
    return make("div", { class: "bar" },
      make("div", {}, make("h3", {}, nameOf(group)), show(make("p"), about)),
      make("div", { class: "steps" }, mover("Previous question", "‹ Back", -1, at === 0),
        mover("Next question", "Next ›", 1, at === shown.length - 1)));
  }

  function heard(group) {
    const asked = make("div", {}, show(make("p", { class: "question" }), group.question));
    if (group.choices) {
      asked.append(make("ul", { class: "choices", "aria-label": "Choices" }, ...group.choices.map((choice) => {
        const gold = choice === group.gold, by = group.responses.filter((r) => r.said === choice);
        const counts = by.some((r) => r.main), chosen = counts && group.step === null;
        const marks = make("span", { class: "mark" }, gold ? "✓ right answer " : "");
        if (by.length) marks.append(show(make("span", { class: "by" }), `${counts ? "●" : "○"} ${answeredBy(by, group)}`));
        return make("li", { class: `${gold ? "gold" : ""}${chosen ? " said" : ""}` }, show(make("span"), choice), marks);
      })));
    }
    if (!group.choices?.includes(group.gold)) asked.append(goldLine(group));
    return make("div", { class: "heard" }, PLAYER.figure(clips[group.clip], group.silent), asked);
  }

  const answeredBy = (by, group) => (group.step === null
    ? `answered: ${by.map((r) => r.who).join(" · ")}` : `answered by ${by.length} of ${group.responses.length}`);

  const goldLine = (group) => (group.gold
    ? show(make("p", {}, make("span", { class: "label" }, "Right answer: ")), group.gold)
    : make("p", { class: "label" }, "The run did not record the right answer."));

  // Cells name their roles, because the table is no table to a screen reader where it is stacked (page.css).
  const cell = (kind, ...children) => make("td", { role: "cell", ...(kind && { class: kind }) }, ...children);

  function responses(group) {
    const sampled = group.step !== null;
    const scored = group.responses.some((r) => r.form !== null || r.reward !== null);  // answers of a result file are not
    const titles = [["", sampled ? "#" : "when"], ["", "response"], ["", "answer"],
      ...(scored ? [["", "format"], ["n", "reward"]] : []), ...(sampled ? [["n", "advantage"]] : [])];
    const head = make("tr", { role: "row" }, ...titles.map(([kind, text]) =>
      make("th", { scope: "col", role: "columnheader", ...(kind && { class: kind }) }, text)));
    const largest = Math.max(1e-9, ...group.responses.map((r) => Math.abs(r.advantage ?? 0)));
    const body = group.responses.map((r) => make("tr", { role: "row", ...(!fits(r, group) && { class: "dim" }) },
      show(cell("who"), r.who), said(r), verdict(r.right, "right", "wrong"),
      ...(scored ? [verdict(r.form, "in form", "out of form"), cell("n reward", digits(r.reward))] : []),
      ...(sampled ? [cell("n gain", advantage(r.advantage, largest))] : [])));
    return make("table", { role: "table", class: `responses${sampled ? "" : " rounds"}` },
      make("caption", { class: "hidden" }, "Responses to the question"),
      make("thead", { role: "rowgroup" }, head), make("tbody", { role: "rowgroup" }, ...body));
  }

  function said(r) {
    const parts = Object.entries(r.parts).map(([name, value]) => `${name} ${digits(value)}`).join(", ");
    const box = cell("said", show(make("span", { class: "text" }), r.text || " "));
    if (r.truncated) box.append(" ", make("span", { class: "tag" }, "cut off"));
    if (parts) box.append(" ", show(make("span", { class: "label" }), parts));
    return box;
  }

  function verdict(value, yes, no) {
    if (value === null) return cell("verdict", "–");
    return cell(`verdict ${value ? "right" : "wrong"}`, value ? `✓ ${yes}` : `✗ ${no}`);
  }

  function advantage(value, largest) {
    if (value === null) return "–";
    const width = (28 * Math.abs(value)) / largest;
    return make("span", { class: "advantage" },
      draw("svg", { viewBox: "0 0 56 8", "aria-hidden": "true" },
        draw("rect", { x: value < 0 ? 28 - width : 28, width, height: 8, class: value < 0 ? "minus" : "plus" }),
        draw("line", { x1: 28, x2: 28, y1: 0, y2: 8 })),
      make("span", {}, `${value < 0 ? "−" : value > 0 ? "+" : ""}${Math.abs(value).toFixed(2)}`));
  }

  // ------------------------------------------------------------------------------------------------------- keyboard
  function press(event) {
    const { target } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || !byId("keys").checked) return;
    if (target.matches("select, textarea, input:not([type=radio]):not([type=checkbox])")) return;
    const key = event.key.toLowerCase();
    if (key === "j") move(1);
    else if (key === "k") move(-1);
    else if (key === "p") PLAYER.toggle();
    else if (/^[1-6]$/.test(key)) {
      const label = byId("kinds").querySelectorAll("label")[+key - 1];
      if (label.hidden) return;
      label.querySelector("input").click();
    } else return;
    event.preventDefault();
    if (key !== "p") byId("listen").scrollIntoView({ block: "nearest" });
  }

  addFilters();
  sets.addEventListener("change", openSet);
  for (const select of [types, steps]) select.addEventListener("change", filter);
  byId("pair").addEventListener("click", () => showPair(null));
  document.addEventListener("keydown", press);
  connectPairs();
  openSet();
})();
