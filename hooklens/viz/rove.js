// Of some items one takes the keyboard, the one that had it last; `next` says which comes after a key: its place, or
// undefined for a key that does not move.
const rove = (container, items, next) => {
  const places = new Map(items.map((item, place) => [item, place]));
  let stop = items[0];
  if (stop) stop.tabIndex = 0;
  container.addEventListener("focusin", (event) => {
    if (!places.has(event.target) || event.target === stop) return;
    stop.tabIndex = -1;
    stop = event.target;
    stop.tabIndex = 0;
  });
  container.addEventListener("keydown", (event) => {
    if (!places.has(event.target)) return;
    const target = items[next(places.get(event.target), event.key)];
    if (!target) return;
    event.preventDefault();
    event.stopPropagation();
    target.focus();
  });
};
// `show` is called with the item that the mouse is on, else with the one that has the keyboard; `hide` when there is
// none.
const point = (container, selector, show, hide) => {
  const itemOf = (event) => event.target.closest(selector);
  const settle = () => {
    const item = container.querySelector(`:is(${selector}):focus`);
    if (item) show(item); else hide();
  };
  container.addEventListener("mouseover", (event) => { const item = itemOf(event); if (item) show(item); });
  container.addEventListener("mouseleave", settle);
  container.addEventListener("focusin", (event) => { const item = itemOf(event); if (item) show(item); });
  // At once, not later: what takes the keyboard next may show something of its own.
  container.addEventListener("focusout", (event) => {
    const next = event.relatedTarget;
    if (!next || !container.contains(next) || !next.closest(selector)) hide();
  });
};
