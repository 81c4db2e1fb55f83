// All that the pages do beyond what they say.
//
// Explorers without a kernel: each position of the sliders was drawn beforehand, and the drawings of
// one explorer are one script, loaded when it comes near the screen. Without this file, or without
// the drawings, the lesson's own static picture stays where it is.
(() => {
  "use strict";

  const arrived = new Map(); // name of an explorer -> what to do with its drawings

  // What each file of drawings calls. (A page that was opened from a disk may load scripts, and
  // nothing else.)
  window.explorerFrames = (name, packed) => arrived.get(name)(packed);

  function load(name, source) {
    return new Promise((resolve, reject) => {
      arrived.set(name, resolve);
      const script = document.createElement("script");
      script.src = source;
      script.onerror = () => reject(new Error(`${source} cannot be loaded`));
      document.head.append(script);
    }).then(unpack);
  }

  async function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function element(name, attributes = {}, text = "") {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  }

  // A row of a name, a slider or a box to tick, and its value. `place()` is which option is chosen.
  function makeControl(control, id, changed) {
    const isBox = control.options.join() === "False,True";
    const row = element("div");
    const label = element("label", { for: id }, control.label);
    const input = element(
      "input",
      isBox
        ? { id, type: "checkbox", autocomplete: "off" } // off: a page loaded again starts anew
        : { id, type: "range", autocomplete: "off", min: 0, max: control.options.length - 1 },
    );
    const value = element("span", { class: "value", "aria-hidden": "true" }); // the input says it
    if (isBox) input.checked = control.start === 1;
    else input.value = control.start;
    const place = () => (isBox ? Number(input.checked) : Number(input.value));
    const words = () => (isBox ? ["no", "yes"][place()] : control.options[place()]);
    const show = () => {
      value.textContent = words();
      if (!isBox) input.setAttribute("aria-valuetext", words());
    };
    input.addEventListener("input", () => {
      show();
      changed();
    });
    show();
    row.append(label, input, value);
    return { row, place, words: () => `${control.label}: ${words()}` };
  }

  function makeExplorer(root) {
    const { name, source } = root.dataset;
    const { controls: described, isPart } = JSON.parse(root.querySelector("script").textContent);
    const drawing = element("div", { class: "drawing", role: "img", tabindex: 0 });
    const said = element("div", { class: "said", role: "status" });
    let kept = null;

    const controls = described.map((control, index) =>
      makeControl(control, `${name}-${index}`, () => draw(true)),
    );

    function draw(isMoved) {
      if (!kept) return;
      let place = 0; // the last control moves first
      controls.forEach((control, index) => {
        place = place * described[index].options.length + control.place();
      });
      const words = `${controls.map((control) => control.words()).join(", ")}. ${kept.titles[place]}`;
      drawing.innerHTML = kept.frames[place];
      drawing.firstElementChild.setAttribute("aria-hidden", "true"); // the words say it
      drawing.setAttribute("aria-label", words);
      if (isMoved) said.textContent = kept.titles[place]; // the slider says its own value
    }

    async function start() {
      try {
        kept = await load(name, source);
      } catch (error) {
        console.warn(error.message);
        return; // the static picture stays
      }
      const rows = element("div", { class: "controls" });
      rows.append(...controls.map((control) => control.row));
      root.append(rows, drawing, said);
      if (isPart) {
        root.append(element("p", {}, "Some positions are left out here; JupyterLab has them all."));
      }
      root.classList.add("live");
      draw(false);
      root.previousElementSibling?.querySelector(".cell_output")?.setAttribute("hidden", "");
    }

    new IntersectionObserver((entries, observer) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      start();
    }, { rootMargin: "800px" }).observe(root.previousElementSibling ?? root);
  }

  if ("DecompressionStream" in window) {
    document.querySelectorAll(".explorer").forEach(makeExplorer);
  }

  // What is wider than the screen scrolls by itself, so the keyboard must be able to reach it.
  function reachable() {
    const boxes = "article pre, article table, article .table-wrapper, article .math, .map";
    for (const box of document.querySelectorAll(boxes)) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  }
  reachable();
  addEventListener("resize", reachable);

  // On a phone the map is wider than the screen: its trunk, the first lessons, is in the middle.
  for (const map of document.querySelectorAll(".map")) {
    map.scrollLeft = (map.scrollWidth - map.clientWidth) / 2;
  }
})();
