// Every visible text with the contrast of its colour against the ground below it, by WCAG 2.2: (L1 + 0.05) / (L2 + 0.05)
// of relative luminances. Grounds that are partly transparent are laid over each other down to the page's.
() => {
  const parse = (text) => {
    const numbers = text.match(/[\d.]+/g).map(Number);
    return [numbers[0], numbers[1], numbers[2], numbers.length > 3 ? numbers[3] : 1];
  };
  const over = (top, below) => [0, 1, 2].map((place) => top[place] * top[3] + below[place] * (1 - top[3]));
  const canvas = matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
  const groundOf = (node) => {
    const layers = [];
    for (let at = node; at && at.nodeType === 1; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), canvas);
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((part) => part / 255).map((p) => p <= 0.04045 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.querySelector(".hooklens"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode, node = text.parentElement;
    if (!text.data.trim() || node.closest("script, style, option, title, .hl-out")) continue;
    const style = getComputedStyle(node);
    if (!node.checkVisibility({ visibilityProperty: true })) continue;
    const isDrawn = node instanceof SVGElement, box = node.closest(".hl-node")?.querySelector("rect");
    const ground = box ? over(parse(getComputedStyle(box).fill), canvas) : groundOf(isDrawn ? node.closest("svg").parentElement : node);
    const ink = over(parse(isDrawn ? style.fill : style.color), ground);
    const [light, dark] = [luminance(ink), luminance(ground)].sort((one, other) => other - one);
    found.push([(light + 0.05) / (dark + 0.05), text.data.trim().slice(0, 30)]);
  }
  return found;
}
