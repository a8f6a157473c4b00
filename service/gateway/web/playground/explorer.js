// The maps of a reply: all of them small, by kind, and one of them large.
import {onThemeChange, showLegend} from "./colors.js";
import {element} from "./dom.js";
import {nameOf, showGrid} from "./grid.js";
import {axes, greatest, headOf, unpack} from "./maps.js";
import {mapView} from "./mapview.js";

const KINDS = {encoder: "encoder", decoder: "decoder", cross: "decoder to source"};

// `scale` says whether colours go up to each map's "own" highest weight, or to "one".
export function explorerOf(host, scale) {
  const find = name => host.querySelector(name);
  const [kinds, grid, title, legend] = [".kinds", ".grid", ".enlarged", ".legend"].map(find);
  const gridParts = [grid.parentElement, host.querySelector("#grid-hint"), legend];
  const view = mapView(host.querySelector(".map"), {queries: "looks", keys: "is looked at"});
  let reply = null, maps = [], kind = "", reduced = "", chosen = {layer: undefined, head: 0};

  const topOf = values => (scale() === "one" ? 1 : greatest(values) || 1);

  function draw() {
    if (!reply) return;
    const shown = maps.filter(map => map.kind === kind);
    const isGrid = shown.length * shown[0].numHeads > 1;
    grid.closest(".card").hidden = !isGrid && kinds.hidden;
    for (const part of gridParts) part.hidden = !isGrid;
    const map = shown.find(one => one.layer === chosen.layer) ?? shown.at(-1);
    const head = Math.min(chosen.head, map.numHeads - 1), name = `Maps of the ${KINDS[kind] ?? kind}, layer by head`;
    showGrid(grid, shown, {topOf, open, name, chosen: {map, head}});
    showLegend(legend, scale() === "one" ? "1" : "each map’s highest");
    open(map, head);
  }

  function open(map, head) {
    chosen = {layer: map.layer, head};
    const name = nameOf(map, head) + reduced, values = headOf(map, head);
    title.textContent = name[0].toUpperCase() + name.slice(1);
    view.show({...axes(map, reply), values, rows: map.rows, columns: map.columns, top: topOf(values)});
  }

  function fillKinds() {
    const found = [...new Set(maps.map(map => map.kind))];
    if (!found.includes(kind)) kind = found[0];
    kinds.hidden = found.length < 2;
    kinds.replaceChildren(...found.map(one => {
      const button = element("button", {type: "button", className: "choice"}, KINDS[one] ?? one);
      button.ariaPressed = String(one === kind);
      button.onclick = () => {
        kind = one;
        for (const other of kinds.children) other.ariaPressed = String(other === button);
        draw();
      };
      return button;
    }));
  }

  onThemeChange(draw);
  return {
    draw,
    show(given, how) {
      reply = given;
      reduced = how;
      maps = given.maps.map(unpack);
      host.hidden = false;
      fillKinds();
      draw();
    },
    hide() {
      reply = null;
      host.hidden = true;
    },
    busy(isBusy) {
      host.classList.toggle("busy", isBusy);
    },
  };
}
