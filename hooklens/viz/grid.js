// One cell of each grid takes the keyboard; arrows move among the cells of its table. The line below the grid tells
// what is in the cell that the mouse or the keyboard is on.
const readout = root.querySelector(".hl-readout");
const rest = readout.textContent;
point(root, "table.hl-grid td", (cell) => { readout.textContent = cell.getAttribute("aria-label"); },
  () => { readout.textContent = rest; });
const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
for (const table of root.querySelectorAll("table.hl-grid")) {
  const rows = [...table.tBodies[0].rows].map((row) => [...row.querySelectorAll("td")]);
  rove(table, rows.flat(), (place, key) => {
    const step = steps[key], width = rows[0].length;
    const row = Math.floor(place / width) + (step ? step[0] : 0), column = place % width + (step ? step[1] : 0);
    return step && column >= 0 && column < width ? row * width + column : undefined;
  });
}
