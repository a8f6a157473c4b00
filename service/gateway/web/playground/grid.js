// A small map for every head of every layer: layers downwards, heads across.
import {colorOf} from "./colors.js";
import {element, rove} from "./dom.js";
import {headOf, shrink} from "./maps.js";

const THUMBNAIL = 64; // pixels a side

// `topOf` gives the weight of full colour for a map's values. `open` is called with (map, head), `chosen` being one.
export function showGrid(host, maps, {topOf, open, name, chosen}) {
  const columns = Math.max(...maps.map(map => map.numHeads));
  host.style.setProperty("--heads", columns);
  host.ariaLabel = name;
  const rows = maps.map(map => newRow(map, topOf, open));
  host.replaceChildren(newHeader(maps[0], columns), ...rows.map(({row}) => row));
  const cells = rows.flatMap(row => row.cells);
  rows[maps.indexOf(chosen.map)].cells[chosen.head].ariaSelected = "true";
  rove(host, cells, (at, key) => nextCell(at, key, columns, cells.length));
}

function nextCell(at, key, columns, num) {
  const column = at % columns;
  if (key === "ArrowRight") return column < columns - 1 ? at + 1 : at;
  if (key === "ArrowLeft") return column > 0 ? at - 1 : at;
  if (key === "ArrowDown") return Math.min(at + columns, num - columns + column);
  if (key === "ArrowUp") return Math.max(at - columns, column);
  return {Home: at - column, End: at - column + columns - 1}[key];
}

function newHeader(map, columns) {
  const names = Array.from({length: columns}, (_, head) => (map.heads ? String(map.heads[head]) : "all"));
  const newName = text => element("span", {role: "columnheader", textContent: text});
  const [corner, ...headers] = ["layer", ...names].map(newName);
  for (const header of headers) header.ariaLabel = `head ${header.textContent}`;
  return element("div", {role: "row", className: "heads"}, corner, ...headers);
}

function newRow(map, topOf, open) {
  const cells = Array.from({length: map.numHeads}, (_, head) => newCell(map, head, topOf, open));
  const header = element("span", {role: "rowheader", textContent: map.layer === null ? "all" : String(map.layer)});
  return {row: element("div", {role: "row"}, header, ...cells), cells};
}

export function nameOf({layer, heads}, head) {
  const name = layer === null ? "all layers" : `layer ${layer}`;
  return heads ? `${name}, head ${heads[head]}` : name;
}

function newCell(map, head, topOf, open) {
  const canvas = element("canvas", {"aria-hidden": "true"});
  paint(canvas, shrink(headOf(map, head), map.rows, map.columns, THUMBNAIL), topOf(headOf(map, head)));
  const cell = element("div", {role: "gridcell", title: nameOf(map, head), ariaLabel: nameOf(map, head)}, canvas);
  const choose = () => {
    const before = cell.closest("[role=grid]").querySelectorAll("[aria-selected=true]");
    for (const other of before) other.ariaSelected = "false";
    cell.ariaSelected = "true";
    open(map, head);
  };
  cell.onclick = () => {
    cell.focus();
    choose();
  };
  cell.onkeydown = event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choose();
  };
  cell.ariaSelected = "false";
  return cell;
}

function paint(canvas, {values, rows, columns}, top) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  for (const [at, value] of values.entries()) image.data.set([...colorOf(value / top), 255], at * 4);
  context.putImageData(image, 0, 0);
}
