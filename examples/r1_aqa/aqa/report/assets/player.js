// The player of a clip: its waveform, its spectrogram and the browser's own controls. One plays at a time.
const PLAYER = (() => {
  let audio = null;
  let address = null;

  function stop() {
    if (audio) { audio.pause(); audio.removeAttribute("src"); audio = null; }
    if (address) { URL.revokeObjectURL(address); address = null; }
  }

  function bytes(text) {
    const binary = atob(text), out = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) out[i] = binary.charCodeAt(i);
    return out;
  }

  function waveform(clip) {
    const middle = 100, columns = clip.peaks.length / 2;
    let outline = "";
    for (let i = 0; i < columns; i++) {
      outline += `M${i + 0.5} ${middle - clip.peaks[2 * i + 1] - 1}V${middle - clip.peaks[2 * i] + 1}`;
    }
    return draw("svg", { viewBox: `0 -8 ${columns} 216`, preserveAspectRatio: "none", role: "img",
      "aria-label": `Waveform of ${clip.seconds.toFixed(1)} seconds` },
      draw("path", { d: outline, stroke: "currentColor", "stroke-width": "0.9", fill: "none" }));
  }

  // The figure of a clip, or why there is none.
  function figure(clip, reason) {
    stop();
    if (!clip) return make("figure", {}, show(make("p", { class: "notice" }, "No clip to play: "), reason ?? "no room in this page"));
    address = URL.createObjectURL(new Blob([bytes(clip.mp3)], { type: "audio/mpeg" }));
    const mine = make("audio", { controls: "", preload: "metadata", src: address, "aria-label": "The clip" });
    audio = mine;
    const head = make("div", { class: "head" });
    const mel = make("img", { src: `data:image/webp;base64,${clip.mel}`,
      alt: `Mel spectrogram, 0 to 8 kHz from below; ${clip.heard}` });
    const pictures = make("div", { class: "pictures" }, waveform(clip), mel, head);
    const seconds = () => (Number.isFinite(mine.duration) ? mine.duration : clip.seconds);
    const follow = () => { head.style.left = `${(100 * mine.currentTime) / seconds()}%`; };
    const tick = () => { follow(); if (!mine.paused) requestAnimationFrame(tick); };
    mine.addEventListener("play", tick);
    mine.addEventListener("seeked", follow);
    mine.addEventListener("timeupdate", follow);
    pictures.addEventListener("click", (event) => {
      const box = pictures.getBoundingClientRect();
      mine.currentTime = ((event.clientX - box.left) / box.width) * seconds();
      mine.play();
    });
    return make("figure", {}, pictures, mine,
      show(make("figcaption", {}, `${clip.seconds.toFixed(1)} s; `), `${clip.heard}; ${clip.name}`));
  }

  function toggle() {
    if (audio) audio.paused ? audio.play() : audio.pause();
  }

  return { figure, stop, toggle };
})();
