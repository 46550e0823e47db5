"use strict";
const byId = id => document.getElementById(id);
const make = (name, className, text = "") => {
  const element = document.createElement(name);
  element.className = className;
  element.textContent = text;
  return element;
};
const svgNames = document.querySelector("svg").namespaceURI;
const slider = byId("step"), play = byId("play"), tip = byId("tip");
const last = Math.max(...traces.map(trace => trace.visible.length));
const samePrompt = traces.every(trace => trace.title === traces[0].title);
const colour = () => document.querySelector("#colour input:checked").value;
const plural = (count, noun) => count + " " + noun + (count === 1 ? "" : "s");
slider.max = last;
byId("prompt").textContent = samePrompt ? traces[0].title : "";
byId("differs").hidden = traces.every(trace => trace.agreement === null);

// A card for each trace: the strategy, the text, and the map of position against step.
const cards = traces.map((trace, index) => {
  const box = make("section", "trace"), head = make("div", "head"), count = make("span", "count");
  const canvas = make("div", "canvas");
  head.append(make("h2", "strategy", trace.strategy), count);
  box.append(head);
  if (!samePrompt) box.append(make("div", "title", trace.title));
  if (trace.agreement !== null) box.append(make("div", "agreement",
    "with the cache " + Math.round(100 * trace.agreement) + " % of the tokens are those of exact decoding"));
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "group");
  canvas.setAttribute("aria-label", "text, " + trace.strategy);
  const spans = trace.pieces.map((piece, column) => {
    const span = make("span", "", piece);
    span.dataset.column = column;
    return span;
  });
  canvas.append(...spans);
  box.append(canvas);
  const map = drawMap(trace, box);
  byId("traces").append(box);
  canvas.addEventListener("pointermove", event => point(index, event.target.dataset.column));
  canvas.addEventListener("pointerdown", event => point(index, event.target.dataset.column));
  canvas.addEventListener("pointerleave", () => point(index));
  canvas.addEventListener("blur", () => point(index));
  canvas.addEventListener("keydown", event => walk(event, index));
  const tokens = trace.written_at.filter((at, column) => at >= 0 && column < (trace.end ?? Infinity)).length;
  const counted = `${plural(tokens, "token")} in ${plural(trace.nfe, "evaluation")}`;
  return { trace, spans, count, counted, map, drawn: [] };
});

function drawMap(trace, box) {
  const first = trace.written_at.findIndex(at => at >= 0), steps = trace.visible.length;
  const thick = Math.max(1, steps / 20); // visible in maps of many steps
  const shape = (x, y, width, height, className) => {
    const rect = document.createElementNS(svgNames, "rect");
    for (const [key, value] of Object.entries({ x, y, width, height, class: className })) rect.setAttribute(key, value);
    return rect;
  };
  const svg = document.createElementNS(svgNames, "svg");
  svg.setAttribute("class", "map");
  svg.setAttribute("viewBox", `0 0 ${trace.pieces.length - first} ${steps}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const line = shape(0, -1, trace.pieces.length - first, thick, "at");
  const cells = trace.written_at.map((at, column) => {
    if (at < 0 || at >= steps) return null;
    const cell = shape(column - first, at + 0.5 - thick / 2, 1, thick, "");
    cell.style.setProperty("--share", at / Math.max(steps - 1, 1));
    return cell;
  });
  svg.append(line, ...cells.filter(Boolean));
  const axes = make("div", "axes");
  axes.append(make("span", "", "position →"), make("span", "", "step ↓"));
  box.append(svg, axes);
  return { line, cells };
}

function draw() {
  const now = Number(slider.value), mode = colour();
  for (const { trace, spans, count, counted, map, drawn } of cards) {
    const steps = trace.visible.length, step = Math.min(now, steps), end = trace.end ?? trace.pieces.length;
    const visible = step < steps ? trace.visible[step] : trace.pieces.length;
    spans.forEach((span, column) => {
      const at = trace.written_at[column], masked = at >= step, piece = trace.pieces[column];
      const block = trace.block[column], classes = ["token"];
      if (at < 0) classes.push("given");
      else if (masked) classes.push("masked");
      else if (column >= end) classes.push("after");
      if (masked && step < steps && trace.candidates[step][column]) classes.push("active");
      if (block >= 0 && block !== trace.block[column - 1]) classes.push("edge");
      if (piece.includes("\n")) classes.push("break");
      if (!masked && trace.agrees[column] === false) classes.push("differs");
      if (at >= 0 && !masked) {
        if (mode !== "new") classes.push(mode);
        // At the end no token is marked as new, for reading.
        else if (at === step - 1 && now < last) classes.push("new");
      }
      const name = classes.join(" "), hidden = column >= visible;
      if (drawn[column] === name + hidden) return;
      drawn[column] = name + hidden;
      span.className = name;
      span.hidden = hidden;
      span.style.setProperty("--share",
        mode === "sure" ? trace.probability[column] : at / Math.max(steps - 1, 1));
    });
    map.line.setAttribute("y", step - 1);
    map.cells.forEach((cell, column) => cell && cell.setAttribute("class", trace.written_at[column] < step ? "done" : ""));
    count.textContent = counted + (steps < last && now >= steps ? " · finished" : "");
  }
  byId("shown").textContent = `step ${now} of ${last}`;
  slider.setAttribute("aria-valuetext", byId("shown").textContent);
  showTip();
}

// The key to the two colour scales.
function drawScale() {
  const ends = { order: ["first", "last"], sure: ["p = 0", "p = 1"] }[colour()], scale = byId("scale");
  scale.replaceChildren();
  if (!ends) return;
  const bar = make("div", "");
  for (let n = 0; n < 12; n++) {
    const cell = make("i", colour());
    cell.style.setProperty("--share", n / 11);
    bar.append(cell);
  }
  scale.append(ends[0], bar, ends[1]);
}

let pointed = null; // [card, column] of the token under the pointer
function point(index, column) {
  if (pointed) cards[pointed[0]].spans[pointed[1]].style.boxShadow = "";
  pointed = column === undefined ? null : [index, Number(column)];
  showTip();
}

function showTip() {
  tip.style.display = pointed ? "block" : "none";
  if (!pointed) return;
  const { trace, spans } = cards[pointed[0]], column = pointed[1], span = spans[column];
  const step = Math.min(Number(slider.value), trace.visible.length), at = trace.written_at[column];
  const asked = at < step ? at : step, best = at < 0 ? [] : trace.candidates[asked]?.[column] ?? [];
  const head = at < 0 ? "given" : at < step
    ? `written at step ${at + 1}, probability ${trace.probability[column].toFixed(3)}`
    : best.length ? `masked; candidates at step ${step + 1}` : "masked";
  tip.replaceChildren(make("p", "", head));
  if (best.length) {
    const table = make("table", "");
    for (const [piece, probability] of best) {
      const row = table.insertRow(), bar = make("span", "bar");
      row.className = at < step && piece === trace.pieces[column] ? "chosen" : "";
      bar.style.width = 100 * probability + "%";
      row.insertCell().append(bar);
      row.insertCell().textContent = probability.toFixed(3);
      row.insertCell().textContent = JSON.stringify(piece);
    }
    tip.append(table);
  }
  span.style.boxShadow = "0 0 0 2px var(--accent)";
  tip.style.left = 0; // so that the content sets the width, not the space next to the token
  // Below the token, or above it at the end of the window.
  const place = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const below = place.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = Math.max(8, Math.min(place.left, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (below ? place.bottom + 8 : Math.max(8, place.top - tip.offsetHeight - 8)) + "px";
}

function go(step) {
  slider.value = step;
  draw();
}

let timer = null;
function toggle() {
  if (timer) {
    clearInterval(timer);
    timer = null;
  } else {
    if (Number(slider.value) >= last) go(0);
    // Long texts play faster: ten seconds in total, within limits that can be followed.
    timer = setInterval(() => {
      go(Number(slider.value) + 1);
      if (Number(slider.value) >= last) toggle();
    }, Math.min(400, Math.max(60, 10000 / last)));
  }
  play.className = timer ? "on" : "";
  play.setAttribute("aria-label", timer ? "pause" : "play");
}

// Keys inside a text move from token to token and through the steps.
function walk(event, index) {
  const { trace, spans } = cards[index], here = pointed && pointed[0] === index ? pointed[1] : -1;
  const shift = { ArrowRight: 1, ArrowLeft: -1 }[event.key], time = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (shift) {
    let column = here < 0 ? trace.written_at.findIndex(at => at >= 0) : here + shift;
    column = Math.max(0, Math.min(column, spans.findLastIndex(span => !span.hidden)));
    point(index, column);
  } else if (time) go(Number(slider.value) + time);
  else if (event.key === "Escape") point(index);
  else return;
  event.preventDefault();
  event.stopPropagation();
}

play.addEventListener("click", toggle);
slider.addEventListener("input", draw);
byId("colour").addEventListener("change", () => { drawScale(); draw(); });
addEventListener("scroll", () => pointed && showTip(), { passive: true });
document.addEventListener("keydown", event => {
  const inside = event.target.tagName === "INPUT" && event.key !== " ";
  if (inside || event.ctrlKey || event.metaKey || event.altKey || event.target === play && event.key === " ") return;
  const target = { ArrowRight: Number(slider.value) + 1, ArrowLeft: Number(slider.value) - 1, Home: 0, End: last }[event.key];
  if (event.key === " ") toggle();
  else if (target !== undefined) go(target);
  else return;
  event.preventDefault();
});
// A lone text is read first and replayed then; several are compared from the start.
go(traces.length === 1 ? last : 0);
