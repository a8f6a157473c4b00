// One map, enlarged: its tokens in two columns with a line for every look, and beside them the heat map.
import {onThemeChange, showLegend} from "./colors.js";
import {alongList, element, rove, svgElement} from "./dom.js";
import {greatest, labelOf} from "./maps.js";
import {cellAt, drawMatrix} from "./matrix.js";

const ROW = 26, WIDTH = 100; // pixels of a token's line, and SVG units across
const MOST_LINES = 500;

// `names` says what the two sides are: {queries, keys}.
export function mapView(host, names) {
  const parts = build(host, names);
  let given = null, map = null, layout = null;
  let active = null, pinned = null; // the token pointed at, else the one with the focus

  function draw() {
    if (!map || !host.clientWidth) return;
    drawLines(parts.lines, map, active);
    tint(parts, map, active);
    layout = drawMatrix(parts.canvas, map, active);
  }

  function look(token) {
    active = token;
    draw();
    parts.readout.textContent = active ? describe(map, active) : hint(map);
  }

  function bind(side, index, button) {
    button.onpointerenter = () => look({side, index});
    button.onpointerleave = () => look(pinned);
    button.onfocus = () => look((pinned = {side, index}));
    button.onblur = () => look((pinned = null));
  }

  function show() {
    const all = {...given, top: given.top ?? (greatest(given.values) || 1)};
    map = parts.hide.checked ? withoutSpecial(all) : all;
    pinned = null;
    fillColumn(parts.queries, map.queries, (index, button) => bind("query", index, button));
    fillColumn(parts.keys, map.keys, (index, button) => bind("key", index, button));
    parts.lines.setAttribute("viewBox", `0 0 ${WIDTH} ${Math.max(map.rows, map.columns) * ROW}`);
    parts.lines.style.height = `${Math.max(map.rows, map.columns) * ROW}px`;
    parts.hide.parentElement.hidden = !given.queries.concat(given.keys).some(token => token.special);
    showLegend(parts.legend, all.top.toFixed(all.top === 1 ? 0 : 3));
    host.hidden = false;
    look(null);
  }

  parts.hide.onchange = show;
  parts.canvas.onpointermove = event => {
    const cell = layout && cellAt(event, layout, map.rows, map.columns);
    if (cell) parts.readout.textContent = pair(map, cell.row, cell.column);
  };
  new ResizeObserver(draw).observe(parts.matrix);
  onThemeChange(() => given && show());
  return {
    show(one) {
      given = one;
      show();
    },
    clear() {
      given = map = null;
      host.hidden = true;
    },
  };
}

function build(host, {queries, keys}) {
  const column = (name, words) => element("div", {className: `tokens ${name}`, role: "group", ariaLabel: words});
  const picture = `Heat map: a row for each token that looks (${queries}), a column for each looked at (${keys})`;
  const parts = {
    queries: column("queries", `${queries}: tokens that look`),
    keys: column("keys", `${keys}: tokens that are looked at`),
    lines: svgElement("svg", {preserveAspectRatio: "none", "aria-hidden": "true"}),
    canvas: element("canvas", {role: "img", ariaLabel: picture}),
    matrix: element("div", {className: "matrix"}),
    readout: element("p", {className: "readout", "aria-live": "polite"}),
    legend: element("div", {className: "legend"}),
    hide: element("input", {type: "checkbox"}),
  };
  const titles = [queries, "", keys].map(words => element("span", {textContent: words}));
  const sides = element("div", {className: "sides", "aria-hidden": "true"}, ...titles);
  const columns = element("div", {className: "columns"}, parts.queries, parts.lines, parts.keys);
  const lines = element("div", {className: "lines"}, sides, columns);
  parts.matrix.append(parts.canvas);
  const choice = element("label", {}, parts.hide, " without special tokens");
  const options = element("div", {className: "row spread"}, parts.legend, choice);
  host.replaceChildren(parts.readout, element("div", {className: "mapview"}, lines, parts.matrix), options);
  return parts;
}

function fillColumn(host, tokens, bind) {
  const buttons = tokens.map((token, index) => {
    const className = `token${token.special ? " special" : ""}${token.isWritten ? " written" : ""}`;
    const button = element("button", {type: "button", className}, element("span", {textContent: labelOf(token)}));
    bind(index, button);
    return button;
  });
  host.replaceChildren(...buttons);
  rove(host, buttons, alongList(buttons.length));
}

// Weights stay what they were: what special tokens got is missing, not shared out among the rest.
function withoutSpecial({queries, keys, values, columns, top}) {
  const kept = tokens => [...tokens.keys()].filter(index => !tokens[index].special);
  const rows = kept(queries), across = kept(keys);
  const left = Float32Array.from(rows.flatMap(row => across.map(column => values[row * columns + column])));
  const sides = {queries: rows.map(row => queries[row]), keys: across.map(column => keys[column])};
  return {...sides, values: left, rows: rows.length, columns: across.length, top};
}

// The strongest looks, or all that the active token has a part in.
function drawLines(svg, {values, columns, top}, active) {
  const least = top * (active ? 0.01 : 0.06), lines = [];
  for (const [at, weight] of values.entries()) {
    const row = Math.floor(at / columns), column = at % columns;
    const isPart = !active || (active.side === "query" ? row : column) === active.index;
    if (weight >= least && isPart) lines.push({row, column, weight});
  }
  lines.sort((one, other) => one.weight - other.weight);
  svg.replaceChildren(...lines.slice(-MOST_LINES).map(line => newLine(line, top)));
}

function newLine({row, column, weight}, top) {
  const [from, to] = [row, column].map(at => (at + 0.5) * ROW);
  const d = `M0 ${from}C${WIDTH / 2} ${from} ${WIDTH / 2} ${to} ${WIDTH} ${to}`;
  return svgElement("path", {d, "stroke-opacity": Math.min(1, weight / top).toFixed(3)});
}

// The weights of the active token beside the tokens of the other side.
function tint({queries, keys}, map, active) {
  for (const [side, host] of [["query", queries], ["key", keys]]) {
    for (const [index, button] of [...host.children].entries()) {
      button.classList.toggle("active", active?.side === side && active.index === index);
      const weight = active && active.side !== side ? weightOf(map, active, index) : 0;
      button.style.setProperty("--much", `${Math.round(Math.min(1, weight / map.top) * 60)}%`);
      button.dataset.weight = weight >= 0.005 ? weight.toFixed(2) : "";
    }
  }
}

const weightOf = ({values, columns}, {side, index}, other) =>
  side === "query" ? values[index * columns + other] : values[other * columns + index];

function describe(map, active) {
  const others = active.side === "query" ? map.keys : map.queries;
  const own = labelOf((active.side === "query" ? map.queries : map.keys)[active.index]);
  const weighed = others.map((token, index) => ({token, weight: weightOf(map, active, index)}));
  const ranked = weighed.sort((one, other) => other.weight - one.weight).slice(0, 4);
  const list = ranked.map(({token, weight}) => `“${labelOf(token)}” ${weight.toFixed(3)}`).join(", ");
  return active.side === "query" ? `“${own}” looks at ${list}` : `“${own}” is looked at by ${list}`;
}

const pair = ({queries, keys, values, columns}, row, column) =>
  `“${labelOf(queries[row])}” looks at “${labelOf(keys[column])}” ${values[row * columns + column].toFixed(4)}`;

function hint(map) {
  if (!map) return "";
  const written = map.queries.some(token => token.isWritten) ? " In italics: what the model wrote." : "";
  return `Point at a token, or move to it with Tab and the arrow keys, to see where it looks.${written}`;
}
