// A guide stands at the place that the mouse or the keyboard is on, whose values are told; the legend's buttons hide a
// line and show it again, and make the others pale while the mouse or the keyboard is on one.
const told = JSON.parse(root.querySelector(".hl-data").textContent);
const plot = root.querySelector(".hl-plot"), guide = root.querySelector(".hl-guide");
const readout = root.querySelector(".hl-readout"), rest = readout.textContent;
const buttons = [...root.querySelectorAll(".hl-legend button")];
const drawnOf = (line) => plot.querySelectorAll(`[data-line="${line}"]`);
const isShown = (line) => buttons[line].getAttribute("aria-pressed") === "true";
const write = (value) => value === null ? "no value" : String(Number(value.toPrecision(4)));
let at = 0;
const show = (place) => {
  at = place;
  guide.setAttribute("x1", told.x[place]);
  guide.setAttribute("x2", told.x[place]);
  guide.style.visibility = "visible";
  const values = told.names.flatMap((name, line) => isShown(line) ? [`${name} ${write(told.values[line][place])}`] : []);
  readout.textContent = `${told.labels[place]}: ${values.join("; ")}`;
};
const hide = () => {
  if (plot.matches(":focus")) { show(at); return; }
  guide.style.visibility = "hidden";
  readout.textContent = rest;
};
plot.addEventListener("mousemove", (event) => {
  const box = plot.getBoundingClientRect(), x = (event.clientX - box.left) * told.width / box.width;
  let nearest = 0;
  told.x.forEach((one, place) => { if (Math.abs(one - x) < Math.abs(told.x[nearest] - x)) nearest = place; });
  show(nearest);
});
plot.addEventListener("mouseleave", hide);
plot.addEventListener("focus", () => show(at));
plot.addEventListener("blur", () => { guide.style.visibility = "hidden"; readout.textContent = rest; });
plot.addEventListener("keydown", (event) => {
  const last = told.x.length - 1;
  const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  show(Math.min(last, Math.max(0, next)));
});
buttons.forEach((button, line) => {
  button.addEventListener("click", () => {
    const next = !isShown(line);
    button.setAttribute("aria-pressed", String(next));
    for (const drawn of drawnOf(line)) drawn.classList.toggle("hl-hidden", !next);
  });
  const dim = (pale) => buttons.forEach((_, other) => {
    for (const drawn of drawnOf(other)) drawn.classList.toggle("hl-pale", pale && other !== line);
  });
  for (const name of ["mouseenter", "focus"]) button.addEventListener(name, () => dim(true));
  for (const name of ["mouseleave", "blur"]) button.addEventListener(name, () => dim(false));
});
