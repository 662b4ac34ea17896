// Patterns are text, in printable characters but three: `width` of them are the root of a value, in parts of
// `largest`; one more than `largest` is no number. Rows hold the keys up to their length, all others are 0.
const told = JSON.parse(root.querySelector(".hl-data").textContent);
const letters = [...Array(95).keys()].map((place) => String.fromCharCode(32 + place))
  .filter((letter) => !'"\\<'.includes(letter));
const digit = new Map(letters.map((letter, place) => [letter, place]));
const queries = [...root.querySelectorAll(".hl-query")], keys = [...root.querySelectorAll(".hl-key")];
const decoded = new Map();
const decode = (head) => {
  if (decoded.has(head)) return decoded.get(head);
  const text = told.patterns[head], values = new Float64Array(queries.length * keys.length);
  let at = 0;
  told.lengths.forEach((length, query) => {
    for (let key = 0; key < length; key++, at += told.width) {
      let code = 0;
      for (let place = 0; place < told.width; place++) code = code * letters.length + digit.get(text[at + place]);
      values[query * keys.length + key] = code > told.largest ? NaN : (code / told.largest) ** 2;
    }
  });
  decoded.set(head, values);
  return values;
};

const thumbs = [...root.querySelectorAll(".hl-thumb")], field = root.querySelector(".hl-field canvas");
const mark = root.querySelector(".hl-mark"), chosen = root.querySelector(".hl-chosen");
const select = root.querySelector(".hl-bar select");
const cell = parseFloat(root.querySelector(".hl-map").style.getPropertyValue("--cell"));
field.style.width = `${keys.length * cell}px`;
field.style.height = `${queries.length * cell}px`;
let head = 0;
const ink = () => {
  const pen = document.createElement("canvas").getContext("2d");
  pen.fillStyle = getComputedStyle(root).getPropertyValue("--hl-for").trim();
  return [1, 3, 5].map((place) => parseInt(pen.fillStyle.slice(place, place + 2), 16));
};
const draw = (canvas, values, [red, green, blue]) => {
  canvas.width = keys.length;
  canvas.height = queries.length;
  // Pixels are written, not painted: a canvas in memory is the quicker one.
  const pen = canvas.getContext("2d", { willReadFrequently: true }), image = pen.createImageData(keys.length, queries.length);
  const power = Number(select.value);
  values.forEach((value, place) => {
    const shade = Number.isNaN(value) ? [127, 127, 127, 90] : [red, green, blue, Math.round(255 * value ** power)];
    image.data.set(shade, 4 * place);
  });
  pen.putImageData(image, 0, 0);
};
let painted = "";
// A picture that has to shrink shows every cell a little rather than some of them.
const small = keys.length > 56 ? "auto" : "pixelated";
for (const thumb of thumbs) thumb.firstElementChild.style.imageRendering = small;
const paint = () => {
  const colour = ink();
  painted = String(colour);
  thumbs.forEach((thumb, place) => draw(thumb.querySelector("canvas"), decode(place), colour));
  draw(field, decode(head), colour);
};
const repaint = () => { if (String(ink()) !== painted) paint(); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
const themes = { attributes: true, attributeFilter: ["data-jp-theme-light", "class", "theme"] };
for (const page of [document.documentElement, document.body]) new MutationObserver(repaint).observe(page, themes);
select.addEventListener("change", paint);

const readout = root.querySelector(".hl-readout"), rest = readout.textContent;
const write = (value) => Number.isNaN(value) ? "no value" : value.toFixed(told.width === 1 ? 2 : 3);
const at = (query, key) => decode(head)[query * keys.length + key];
const name = (label) => label.getAttribute("aria-label");
const place = (left, top, width, height) => {
  const style = { display: "block", left: left * cell, top: top * cell, width: width * cell, height: height * cell };
  for (const [side, size] of Object.entries(style)) mark.style[side] = typeof size === "number" ? `${size}px` : size;
};
const clear = () => {
  mark.style.display = "none";
  for (const label of [...queries, ...keys]) { label.style.background = ""; label.classList.remove("hl-told"); }
};
const tint = (labels, values) => labels.forEach((label, place) => {
  label.style.background = `rgb(var(--hl-blue)/${0.75 * (values[place] || 0) ** Number(select.value)})`;
});
const most = (labels, values) => values.map((value, place) => [value, place]).filter(([value]) => value > 0)
  .sort((one, other) => other[0] - one[0]).slice(0, 5)
  .map(([value, place]) => `${name(labels[place]).replace(/^\w+ /, "")} ${write(value)}`).join("; ") || "nothing";
const tell = (query, key) => {
  clear();
  if (key === null) {
    const values = keys.map((_, place) => at(query, place));
    place(0, query, keys.length, 1);
    tint(keys, values);
    queries[query].classList.add("hl-told");
    readout.textContent = `${name(queries[query])} looks at ${most(keys, values)}`;
  } else if (query === null) {
    const values = queries.map((_, place) => at(place, key));
    place(key, 0, 1, queries.length);
    tint(queries, values);
    keys[key].classList.add("hl-told");
    readout.textContent = `${name(keys[key])} is looked at by ${most(queries, values)}`;
  } else {
    place(key, query, 1, 1);
    queries[query].classList.add("hl-told");
    keys[key].classList.add("hl-told");
    readout.textContent = `${name(queries[query])} looks at ${name(keys[key])}: ${write(at(query, key))}`;
  }
};
let shown = null;
const show = (query, key) => { shown = [query, key]; tell(query, key); };
const hide = () => { shown = null; clear(); readout.textContent = rest; };
const choose = (next) => {
  thumbs[head].setAttribute("aria-checked", "false");
  head = next;
  thumbs[head].setAttribute("aria-checked", "true");
  chosen.textContent = told.names[head];
  draw(field, decode(head), ink());
  if (shown) tell(...shown);
};
thumbs.forEach((thumb, place) => {
  thumb.addEventListener("click", () => choose(place));
  thumb.addEventListener("focus", () => choose(place));
});
const line = root.querySelector(".hl-thumbs").querySelectorAll(".hl-thumb").length;
rove(root.querySelector(".hl-heads"), thumbs, (place, key) => ({ ArrowRight: place + 1, ArrowLeft: place - 1,
  ArrowDown: place + line, ArrowUp: place - line, Home: 0, End: thumbs.length - 1 })[key]);
for (const [axis, labels, of] of [[".hl-query-axis", queries, (place) => [place, null]],
  [".hl-key-axis", keys, (place) => [null, place]]]) {
  const container = root.querySelector(axis);
  point(container, "span", (label) => show(...of(labels.indexOf(label))), hide);
  rove(container, labels, (place, key) => ({ ArrowRight: place + 1, ArrowDown: place + 1, ArrowLeft: place - 1,
    ArrowUp: place - 1, Home: 0, End: labels.length - 1 })[key]);
}
const clamp = (number, size) => Math.min(size - 1, Math.max(0, number));
field.addEventListener("mousemove", (event) => show(clamp(Math.floor(event.offsetY / cell), queries.length),
  clamp(Math.floor(event.offsetX / cell), keys.length)));
field.addEventListener("mouseleave", hide);
const cursor = [0, 0], steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
field.addEventListener("focus", () => show(...cursor));
field.addEventListener("blur", hide);
field.addEventListener("keydown", (event) => {
  const step = steps[event.key];
  if (!step) return;
  event.preventDefault();
  event.stopPropagation();
  cursor[0] = clamp(cursor[0] + step[0], queries.length);
  cursor[1] = clamp(cursor[1] + step[1], keys.length);
  show(...cursor);
});
paint();
