// One cell of each grid takes the keyboard; arrows move among the cells of its table. The line below the grid tells
// what is in the cell that the mouse or the keyboard is on.
const readout = root.querySelector(".hl-readout");
const rest = readout.textContent;
const tell = (cell) => { readout.textContent = cell ? cell.getAttribute("aria-label") : rest; };
const cellOf = (event) => event.target.closest("table.hl-grid td");
root.addEventListener("mouseover", (event) => { const cell = cellOf(event); if (cell) tell(cell); });
root.addEventListener("mouseleave", () => tell(null));
root.addEventListener("focusin", (event) => { const cell = cellOf(event); if (cell) tell(cell); });
root.addEventListener("focusout", () => tell(null));
for (const table of root.querySelectorAll("table.hl-grid")) {
  const first = table.querySelector("td");
  if (first) first.tabIndex = 0;
}
const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
root.addEventListener("keydown", (event) => {
  const cell = cellOf(event), step = steps[event.key];
  if (!cell || !step) return;
  const row = cell.parentElement, rows = [...row.parentElement.children];
  const target = rows[rows.indexOf(row) + step[0]]?.querySelectorAll("td")[
    [...row.querySelectorAll("td")].indexOf(cell) + step[1]];
  if (!target) return;
  event.preventDefault();
  event.stopPropagation();
  cell.tabIndex = -1;
  target.tabIndex = 0;
  target.focus();
});
