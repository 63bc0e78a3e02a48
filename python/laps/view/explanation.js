for (const root of document.querySelectorAll(".laps-why:not([data-ready])")) {
  root.dataset.ready = "";
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const cells = [...root.querySelectorAll(".cell")];
  const chips = [...root.querySelectorAll(".words button")];
  const note = root.querySelector(".note"), modes = root.querySelector(".modes");
  const HEAT = "230,159,0", COLD = "86,180,233";
  // Told apart under every form of colour blindness (Okabe and Ito), used again after eight.
  const COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF"];
  const largest = (values) => Math.max(...values.map(Math.abs), 1e-12);
  const digits = (x) => { const text = Math.abs(x).toFixed(3); return (x < 0 && Number(text) ? "\u2212" : "") + text; };
  const frame = root.querySelector(".frame");
  // Less than this share of the strongest is no reason to show the negative half of a scale.
  const SEEN = 0.02;
  // One scale for all patches: what adds nothing must not look decisive.
  const topPatch = largest(data.words.flatMap((word) => word.patches));
  const topWord = largest(data.words.map((word) => word.share));
  const tint = (x, most) => `rgba(${x < 0 ? COLD : HEAT},${Math.min(1, Math.abs(x) / most)})`;
  const MODES = { "words": null, "groups": null, ...data.scores };
  let mode = "words", pinned = null;

  const scale = document.createElement("p");
  scale.className = "scale";
  note.after(scale);
  const showScale = (low, high, paint) => {
    scale.innerHTML = "";
    const bar = document.createElement("i");
    bar.style.background = paint;
    scale.append(digits(low), bar, digits(high));
  };

  function clear() {
    cells.forEach((cell) => { cell.style.background = cell.style.borderRight = cell.style.borderBottom = ""; cell.classList.remove("marked", "dropped"); });
  }
  function paintBase() {
    frame.classList.toggle("grey", mode !== "words");
    clear();
    const dropped = data.kept.includes(0);
    if (mode === "words") {
      cells.forEach((cell, i) => cell.classList.toggle("dropped", !data.kept[i]));
      scale.textContent = dropped ? `Striped: dropped patches${data.fused ? ", which form one token together" : ""}.` : "All patches are kept.";
    } else if (mode === "groups") {
      cells.forEach((cell, i) => {
        cell.classList.toggle("dropped", !data.kept[i]);
        if (data.kept[i]) cell.style.background = COLOURS[data.groups[i] % COLOURS.length] + "99";
        // Neighbours may have the same colour and be of different tokens.
        const line = (j) => (data.groups[j] !== data.groups[i] ? "1px solid #fff" : "");
        if ((i + 1) % data.columns) cell.style.borderRight = line(i + 1);
        if (cells[i + data.columns]) cell.style.borderBottom = line(i + data.columns);
      });
      scale.textContent = `One colour per token; after eight they come again.${dropped ? " Striped: dropped." : ""}`;
    } else {
      const values = MODES[mode], low = Math.min(...values), high = Math.max(...values);
      cells.forEach((cell, i) => {
        const share = high > low ? (values[i] - low) / (high - low) : 0.5;
        cell.style.background = `rgba(${HEAT},${0.9 * share})`;
      });
      showScale(low, high, `linear-gradient(90deg, rgba(${HEAT},0), rgba(${HEAT},.9))`);
    }
    chips.forEach((chip, j) => {
      chip.style.borderBottomColor = tint(data.words[j].share, topWord);
      chip.querySelector("small").textContent = digits(data.words[j].share);
    });
  }
  function showWord(j) {
    const word = data.words[j];
    clear();
    // The picture in grey, so that no colour of its own looks like heat. Each word has its own scale.
    const most = largest(word.patches);
    frame.classList.add("grey");
    cells.forEach((cell, i) => { cell.style.background = tint(0.85 * word.patches[i], most); });
    const negative = word.patches.some((share) => share < -SEEN * most);
    showScale(negative ? -most : 0, most, `linear-gradient(90deg, ${negative ? `rgba(${COLD},.85), ` : ""}transparent, rgba(${HEAT},.85))`);
    const sum = word.patches.reduce((a, b) => a + b, 0);
    note.textContent = `\u201c${word.text}\u201d adds ${digits(word.share)} to the score, ${digits(sum)} of it from patches. ` +
      `It matches ${word.token} best (${digits(word.alignment)}).`;
  }
  function showPatch(i) {
    const shares = data.words.map((word) => word.patches[i]);
    chips.forEach((chip, j) => {
      chip.style.borderBottomColor = tint(shares[j], topPatch);
      chip.querySelector("small").textContent = digits(shares[j]);
    });
    const best = shares.indexOf(Math.max(...shares)), sum = shares.reduce((a, b) => a + b, 0);
    const group = data.groups[i] < 0 ? "dropped" : `kept, most of it in ${data.tokens[data.groups[i]]}`;
    cells.forEach((cell, k) => cell.classList.toggle("marked", k === i || (data.groups[i] >= 0 && data.groups[k] === data.groups[i])));
    note.textContent = `Row ${Math.floor(i / data.columns) + 1}, column ${i % data.columns + 1}: ${group}; adds ${digits(sum)} to the score` +
      (shares[best] >= 0.0005 ? `, most of it with \u201c${data.words[best].text}\u201d.` : ".");
  }
  function rest() {
    paintBase();
    if (pinned !== null) showWord(pinned);
    else note.textContent = "Point at a word to see its patches, or at a patch to see its words. Click a word to keep it.";
  }
  function select(name) {
    mode = name;
    for (const button of modes.children) button.setAttribute("aria-pressed", button.dataset.mode === mode);
    paintBase();
  }
  for (const name of Object.keys(MODES)) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.mode = name;
    button.textContent = { words: "kept patches and words", groups: "patches merged into tokens" }[name] || name;
    button.addEventListener("click", () => { pin(null); select(name); rest(); });
    modes.append(button);
  }
  function pin(j) {
    pinned = j;
    chips.forEach((chip, k) => chip.setAttribute("aria-pressed", k === pinned));
  }
  chips.forEach((chip, j) => {
    const word = data.words[j];
    chip.setAttribute("aria-label", `${word.text}, adds ${digits(word.share)}`);
    for (const event of ["pointerenter", "focus"]) chip.addEventListener(event, () => showWord(j));
    for (const event of ["pointerleave", "blur"]) chip.addEventListener(event, rest);
    chip.addEventListener("click", () => { pin(pinned === j ? null : j); pinned === null ? rest() : showWord(j); });
  });
  cells.forEach((cell, i) => {
    cell.tabIndex = i ? -1 : 0;
    const row = Math.floor(i / data.columns) + 1, column = i % data.columns + 1;
    cell.setAttribute("aria-label", `row ${row}, column ${column}, ${data.kept[i] ? "kept" : "dropped"}`);
    for (const event of ["pointerenter", "focus"]) cell.addEventListener(event, () => { rest(); showPatch(i); });
    for (const event of ["pointerleave", "blur"]) cell.addEventListener(event, rest);
    cell.addEventListener("keydown", (event) => {
      const column = i % data.columns;
      const to = { ArrowLeft: column ? i - 1 : i, ArrowRight: column + 1 < data.columns ? i + 1 : i,
        ArrowUp: i - data.columns, ArrowDown: i + data.columns, Home: i - column, End: i - column + data.columns - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      if (!cells[to]) return;
      cell.tabIndex = -1;
      cells[to].tabIndex = 0;
      cells[to].focus();
    });
  });
  root.addEventListener("keydown", (event) => { if (event.key === "Escape") { pin(null); rest(); } });
  pin(null);
  select("words");
  rest();
}
