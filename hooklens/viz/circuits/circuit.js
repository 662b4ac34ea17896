// The node or the edge that the mouse or the keyboard is on shows what it is joined to; everything else is dimmed.
const told = JSON.parse(root.querySelector(".hl-data").textContent);
const drawing = root.querySelector(".hl-circuit"), nodes = [...drawing.querySelectorAll(".hl-node")];
const readout = root.querySelector(".hl-readout"), rest = readout.textContent;
const light = (isLit, text) => {
  drawing.classList.add("hl-dimmed");
  const lit = new Set();
  for (const path of drawing.querySelectorAll(".hl-edge")) {
    const edge = Number(path.dataset.edge), is = isLit(edge);
    path.classList.toggle("hl-lit", is);
    if (is) for (const node of told.edges[edge]) lit.add(node);
  }
  nodes.forEach((node, place) => node.classList.toggle("hl-lit", lit.has(place)));
  readout.textContent = text;
};
const show = (item) => {
  if (item.classList.contains("hl-node")) {
    const place = nodes.indexOf(item);
    light((edge) => told.edges[edge].includes(place), item.getAttribute("aria-label"));
    item.classList.add("hl-lit");
  } else {
    const shown = Number(item.dataset.edge);
    light((edge) => edge === shown, told.told[shown]);
  }
};
const hide = () => {
  drawing.classList.remove("hl-dimmed");
  for (const item of drawing.querySelectorAll(".hl-lit")) item.classList.remove("hl-lit");
  readout.textContent = rest;
};
point(drawing, ".hl-node, .hl-hit", show, hide);
drawing.addEventListener("mouseout", (event) => {
  if (!event.relatedTarget?.closest?.(".hl-node, .hl-hit")) {
    const focused = drawing.querySelector(".hl-node:focus");
    if (focused) show(focused); else hide();
  }
});
const turns = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
rove(drawing, nodes, (place, key) => {
  if (key === "Home") return 0;
  if (key === "End") return nodes.length - 1;
  const turn = turns[key];
  if (!turn) return undefined;
  const [x, level] = told.nodes[place];
  const near = told.nodes.map(([x2, level2], other) => [other, x2, level2]).filter(([other, x2, level2]) =>
    turn[0] ? level2 === level && (x2 - x) * turn[0] > 0 : level2 === level + turn[1]);
  near.sort((one, other) => Math.abs(one[1] - x) - Math.abs(other[1] - x));
  return near[0]?.[0];
});
