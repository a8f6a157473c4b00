// Elements from data. Whatever a server or a user wrote becomes text here and never markup.

export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties))
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function svgElement(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// `act` once nothing more has come for `ms`.
export function whenQuiet(act, ms) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, ms);
  };
}

export function say(node, words) {
  node.textContent = words;
  node.hidden = !words;
}

// One element of a group is in the tab order; arrow keys move among them. `step` gives the index to go to, from the
// index and the key, or undefined for keys that are not its own.
export function rove(host, items, step) {
  const go = to => {
    for (const item of items) item.tabIndex = -1;
    items[to].tabIndex = 0;
  };
  if (items.length) go(Math.max(0, items.findIndex(item => item.matches("[aria-selected=true]"))));
  host.onkeydown = event => {
    const at = items.indexOf(event.target);
    const to = at < 0 ? undefined : step(at, event.key);
    if (to === undefined || !items[to]) return;
    event.preventDefault();
    go(to);
    items[to].focus();
  };
  for (const [at, item] of items.entries()) item.addEventListener("focus", () => go(at));
}

export const alongList = num => (at, key) =>
  ({ArrowDown: at + 1, ArrowRight: at + 1, ArrowUp: at - 1, ArrowLeft: at - 1, Home: 0, End: num - 1})[key];

// The models a panel can ask. The choice is hidden when there is none to make.
export function fillModels(label, models) {
  const select = label.querySelector("select");
  select.replaceChildren(...models.map(model => element("option", {value: model.id, textContent: model.id})));
  label.hidden = models.length < 2;
  return select;
}

export const milliseconds = seconds =>
  seconds >= 1 ? `${seconds.toFixed(2)} s` : `${(seconds * 1000).toFixed(seconds < 0.1 ? 1 : 0)} ms`;
