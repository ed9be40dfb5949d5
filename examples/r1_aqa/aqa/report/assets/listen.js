// The listening page: a list of groups, and the chosen one with its clip and responses.
(() => {
  const { groups, clips } = DATA;
  if (!groups.length) return;
  const list = byId("list"), article = byId("group"), steps = byId("step");
  const KINDS = [
    ["all", "all", () => true],
    ["right", "right", (r) => r.right === true],
    ["wrong", "wrong", (r) => r.right === false],
    ["form", "out of format", (r) => r.form === false],
  ];
  let fits = KINDS[0][2];
  let shown = [];
  let chosen = null;
  let player = null;
  let address = null;

  KINDS.forEach(([value, label, test], i) => {
    const count = groups.reduce((sum, group) => sum + group.responses.filter(test).length, 0);
    const radio = make("input", { type: "radio", name: "kind", value });
    radio.checked = i === 0;
    radio.addEventListener("change", () => { fits = test; filter(); });
    byId("kinds").append(make("label", {}, radio, label, make("span", { class: "count" }, ` ${count}`)));
  });
  for (const step of new Set(groups.map((group) => group.step))) steps.append(make("option", { value: step }, step));
  steps.addEventListener("change", filter);

  function filter() {
    shown = groups.filter((group) => (!steps.value || group.step === +steps.value) && group.responses.some(fits));
    list.replaceChildren(...shown.map(entry));
    if (!shown.length) {
      list.append(make("p", { class: "empty" }, "No group fits the filter."));
      article.replaceChildren(make("p", { class: "empty" }, "Nothing to show."));
      stop();
      chosen = null;
    } else choose(shown.includes(chosen) ? chosen : shown[0]);
  }

  function tally(group) {
    const { length } = group.responses;
    if (group.responses.every((r) => r.right === null)) return `${length} responses`;
    return `${group.responses.filter((r) => r.right).length} of ${length} right`;
  }

  function entry(group) {
    const pips = make("span", { class: "pips", "aria-hidden": "true" },
      ...group.responses.map((r) => make("span", { class: `pip${r.right ? " right" : ""}${r.form === false ? " off" : ""}` })));
    const button = make("button", { type: "button" },
      make("span", { class: "where" }, `step ${group.step} · ${group.number + 1}`),
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
    if (group !== chosen) stop();
    chosen = group;
    article.replaceChildren(top(group, at), heard(group), responses(group));
  }

  function move(by) {
    if (!shown.length) return;
    const next = Math.min(Math.max(shown.indexOf(chosen) + by, 0), shown.length - 1);
    if (shown[next] !== chosen) choose(shown[next], true);
  }

  function top(group, at) {
    const right = tally(group);
    byId("say").textContent = `Step ${group.step}, group ${group.number + 1}: ${right}`;
    const back = make("button", { type: "button", "aria-label": "Previous group" }, "‹ Back");
    const next = make("button", { type: "button", "aria-label": "Next group" }, "Next ›");
    back.setAttribute("aria-disabled", at === 0);  // not disabled, which would lose the focus
    next.setAttribute("aria-disabled", at === shown.length - 1);
    back.addEventListener("click", () => { move(-1); article.querySelector("[aria-label='Previous group']").focus(); });
    next.addEventListener("click", () => { move(1); article.querySelector("[aria-label='Next group']").focus(); });
    return make("div", { class: "bar" },
      make("div", {}, make("h3", {}, `Step ${group.step}, group ${group.number + 1}`),
        make("p", {}, `${right} · ${at + 1} of ${shown.length} shown`)),
      make("div", { class: "steps" }, back, next));
  }

  function heard(group) {
    const asked = make("div", {}, show(make("p", { class: "question" }), group.question));
    if (group.choices) {
      const known = group.choices.includes(group.gold);
      asked.append(make("ul", { class: "choices", "aria-label": "Choices" }, ...group.choices.map((choice) => {
        const gold = choice === group.gold;
        const item = make("li", gold ? { class: "gold" } : {}, show(make("span"), choice));
        if (gold) item.append(make("span", { class: "mark" }, "✓ right answer"));
        return item;
      })));
      if (!known) asked.append(goldLine(group));
    } else asked.append(goldLine(group));
    return make("div", { class: "heard" }, listenTo(group), asked);
  }

  const goldLine = (group) => (group.gold
    ? show(make("p", {}, make("span", { class: "label" }, "Right answer: ")), group.gold)
    : make("p", { class: "label" }, "The run did not record the right answer."));

  function listenTo(group) {
    const clip = clips[group.clip];
    if (!clip) return make("figure", {}, show(make("p", { class: "notice" }, "No clip to play: "), group.silent ?? "no room in this page"));
    stop();
    address = URL.createObjectURL(new Blob([bytes(clip.mp3)], { type: "audio/mpeg" }));
    player = make("audio", { controls: "", preload: "metadata", src: address, "aria-label": "The clip" });
    const head = make("div", { class: "head" });
    const middle = 100, outline = [];
    const columns = clip.peaks.length / 2;
    for (let i = 0; i < columns; i++) outline.push(`M${i + 0.5} ${middle - clip.peaks[2 * i + 1] - 1}V${middle - clip.peaks[2 * i] + 1}`);
    const wave = draw("svg", { viewBox: `0 -8 ${columns} 216`, preserveAspectRatio: "none", role: "img",
      "aria-label": `Waveform of ${clip.seconds.toFixed(1)} seconds` },
      draw("path", { d: outline.join(""), stroke: "currentColor", "stroke-width": "0.9", fill: "none" }));
    const mel = make("img", { src: `data:image/webp;base64,${clip.mel}`,
      alt: `Mel spectrogram, 0 to 8 kHz from below; ${clip.heard}` });
    const pictures = make("div", { class: "pictures" }, wave, mel, head);
    const seconds = () => (Number.isFinite(player.duration) ? player.duration : clip.seconds);
    const mine = player;
    const follow = () => { head.style.left = `${(100 * mine.currentTime) / seconds()}%`; };
    const tick = () => { follow(); if (!mine.paused) requestAnimationFrame(tick); };
    player.addEventListener("play", tick);
    player.addEventListener("seeked", follow);
    player.addEventListener("timeupdate", follow);
    pictures.addEventListener("click", (event) => {
      const box = pictures.getBoundingClientRect();
      mine.currentTime = ((event.clientX - box.left) / box.width) * seconds();
      mine.play();
    });
    return make("figure", {}, pictures, player,
      show(make("figcaption", {}, `${clip.seconds.toFixed(1)} s; `), `${clip.heard}; ${clip.name}`));
  }

  function bytes(text) {
    const binary = atob(text), out = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) out[i] = binary.charCodeAt(i);
    return out;
  }

  function stop() {
    if (player) { player.pause(); player.removeAttribute("src"); player = null; }
    if (address) { URL.revokeObjectURL(address); address = null; }
  }

  function responses(group) {
    const largest = Math.max(1e-9, ...group.responses.map((r) => Math.abs(r.advantage ?? 0)));
    const head = make("tr", { role: "row" }, ...[["", "#"], ["", "response"], ["", "answer"], ["", "format"], ["n", "reward"], ["n", "advantage"]]
      .map(([kind, text]) => make("th", { scope: "col", role: "columnheader", ...(kind && { class: kind }) }, text)));
    const body = group.responses.map((r, i) => {
      const said = show(make("span", { class: "text" }), r.text || " ");
      const parts = Object.entries(r.parts).map(([name, value]) => `${name} ${digits(value)}`).join(", ");
      const cell = make("td", { role: "cell", class: "said" }, said);
      if (r.truncated) cell.append(" ", make("span", { class: "tag" }, "cut off"));
      if (parts) cell.append(" ", show(make("span", { class: "label" }), parts));
      return make("tr", { role: "row", ...(!fits(r) && { class: "dim" }) },
        make("td", { role: "cell" }, String(i + 1)), cell, verdict(r.right, "right", "wrong"), verdict(r.form, "in form", "out of form"),
        make("td", { role: "cell", class: "n reward" }, digits(r.reward)), make("td", { role: "cell", class: "n gain" }, advantage(r.advantage, largest)));
    });
    return make("table", { role: "table", class: "responses" }, make("caption", { class: "hidden" }, "Responses of the group"),
      make("thead", { role: "rowgroup" }, head), make("tbody", { role: "rowgroup" }, ...body));
  }

  function verdict(value, yes, no) {
    if (value === null) return make("td", { role: "cell", class: "verdict" }, "–");
    return make("td", { role: "cell", class: `verdict ${value ? "right" : "wrong"}` }, value ? `✓ ${yes}` : `✗ ${no}`);
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

  document.addEventListener("keydown", (event) => {
    const { target } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || !byId("keys").checked) return;
    if (target.matches("select, textarea, input:not([type=radio]):not([type=checkbox])")) return;
    const key = event.key.toLowerCase();
    if (key === "j") move(1);
    else if (key === "k") move(-1);
    else if (key === "p" && player) player.paused ? player.play() : player.pause();
    else if (/^[1-4]$/.test(key)) {
      const radio = byId("kinds").querySelectorAll("input")[+key - 1];
      radio.checked = true;
      radio.dispatchEvent(new Event("change"));
    } else return;
    event.preventDefault();
    if (key !== "p") byId("listen").scrollIntoView({ block: "nearest" });
  });
  filter();
})();
