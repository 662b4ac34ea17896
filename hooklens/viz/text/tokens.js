// Colours follow the row of values that is chosen; the line below the text tells the token that the mouse or the
// keyboard is on, and what could stand in its place.
const told = JSON.parse(root.querySelector(".hl-data").textContent);
const text = root.querySelector(".hl-text"), tokens = [...text.querySelectorAll(".hl-token")];
const readout = root.querySelector(".hl-readout"), rest = readout.textContent;
const others = root.querySelector(".hl-alternatives"), select = root.querySelector("select");
const bar = root.querySelector(".hl-scale i"), ends = root.querySelectorAll(".hl-scale span");
const labels = tokens.map((token) => token.getAttribute("aria-label").replace(/: [^:]*$/, ""));
const write = (value) => value === null ? "no value" : String(Number(value.toPrecision(3)));
let row = 0;
const tell = (token) => {
  const place = tokens.indexOf(token), name = told.names[row];
  readout.textContent = `${labels[place]}: ${name ? name + " " : ""}${write(told.values[row][place])}`;
  if (!others) return;
  others.replaceChildren(...told.alternatives[place].map(([other, probability]) => {
    const item = document.createElement("span");
    item.textContent = `${other} ${write(probability)}`;
    item.style.setProperty("--share", probability ?? 0);
    return item;
  }));
};
point(text, ".hl-token", tell, () => { readout.textContent = rest; if (others) others.replaceChildren(); });
rove(text, tokens, (place, key) => ({ ArrowRight: place + 1, ArrowLeft: place - 1, ArrowDown: place + 1,
  ArrowUp: place - 1, Home: 0, End: tokens.length - 1 })[key]);
const paint = (value, largest, signed) => {
  if (value === null) return told.none;
  const share = largest ? value / largest : 0, hue = signed && share < 0 ? told.against : told.for;
  return `rgb(${hue}/${told.opaque * Math.min(1, signed ? Math.abs(share) : Math.max(0, share))})`;
};
if (select) select.addEventListener("change", () => {
  row = Number(select.value);
  const largest = told.largest[row], signed = told.signed[row];
  tokens.forEach((token, place) => {
    token.style.background = paint(told.values[row][place], largest, signed);
    token.setAttribute("aria-label", `${labels[place]}: ${write(told.values[row][place])}`);
  });
  bar.style.background = told.gradients[row];
  ends[0].textContent = signed ? write(-largest) : "0.0";
  ends[1].textContent = write(largest);
});
