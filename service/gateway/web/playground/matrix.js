// One map as a heat map with its tokens along the sides. Wide ones scroll.
import {cssOf} from "./colors.js";
import {labelOf} from "./maps.js";

const FONT = "12px system-ui, sans-serif";
const LEAST = 5, MOST = 32, LABELLED = 11; // pixels of a cell: the least, the most, and the least that gets a label
const FEW = 60; // tokens that are labelled even where the map has to scroll for it

export function drawMatrix(canvas, {queries, keys, values, rows, columns, top}, active) {
  const context = canvas.getContext("2d"), style = getComputedStyle(canvas);
  context.font = FONT;
  const layout = layoutOf(context, canvas.parentElement.clientWidth, queries, keys);
  resize(canvas, context, layout, rows, columns);
  context.font = FONT;
  const {left, upper, cell} = layout, size = cell < 10 ? cell : cell - 1; // lines between them while there is room
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      context.fillStyle = cssOf(values[row * columns + column] / top);
      context.fillRect(left + column * cell, upper + row * cell, size, size);
    }
  }
  if (active) frame(context, layout, active, rows, columns, style.outlineColor);
  context.fillStyle = style.color;
  if (layout.isLabelled) drawLabels(context, layout, queries, keys);
  return layout;
}

function frame(context, {left, upper, cell}, {side, index}, rows, columns, color) {
  const row = [left, upper + index * cell, columns * cell, cell];
  const column = [left + index * cell, upper, cell, rows * cell];
  const [x, y, width, height] = side === "query" ? row : column;
  context.strokeStyle = color;
  context.lineWidth = 2;
  context.strokeRect(x - 0.5, y - 0.5, width, height);
}

function layoutOf(context, available, queries, keys) {
  const widest = tokens => Math.max(...tokens.map(token => context.measureText(labelOf(token)).width));
  const left = Math.ceil(widest(queries)) + 8, slanted = Math.ceil(widest(keys) * Math.SQRT1_2) + 14;
  const bare = Math.floor((available - 2) / keys.length), fit = Math.floor((available - left - slanted) / keys.length);
  if (bare < LABELLED && keys.length > FEW) return {left: 1, upper: 1, right: 1, cell: Math.max(LEAST, bare), isLabelled: false};
  return {left, upper: slanted, right: slanted, cell: Math.min(MOST, Math.max(LABELLED, fit)), isLabelled: true};
}

function resize(canvas, context, {left, upper, right, cell}, rows, columns) {
  const width = left + columns * cell + right, height = upper + rows * cell + 1, ratio = devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  context.scale(ratio, ratio);
}

function drawLabels(context, {left, upper, cell}, queries, keys) {
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (const [row, token] of queries.entries()) context.fillText(labelOf(token), left - 6, upper + (row + 0.5) * cell);
  context.textAlign = "left";
  for (const [column, token] of keys.entries()) {
    context.save();
    context.translate(left + (column + 0.5) * cell, upper - 6);
    context.rotate(-Math.PI / 4);
    context.fillText(labelOf(token), 0, 0);
    context.restore();
  }
}

// The cell under the pointer, or null.
export function cellAt(event, {left, upper, cell}, rows, columns) {
  const column = Math.floor((event.offsetX - left) / cell), row = Math.floor((event.offsetY - upper) / cell);
  return row >= 0 && column >= 0 && row < rows && column < columns ? {row, column} : null;
}
