// Attention maps as the server sends them -> arrays to draw. Pure: knows neither page nor server.

// `values` is (heads, rows, columns) in one array; a row is a token that looks, a column one that is looked at.
export function unpack({kind, layer, heads, shape, weights}) {
  const [numHeads, rows, columns] = shape;
  const values = typeof weights === "string" ? fromBase64(weights) : Float32Array.from(weights.flat(Infinity));
  if (values.length !== numHeads * rows * columns) throw new Error(`a map of ${shape} has ${values.length} weights`);
  return {kind, layer: layer ?? null, heads: heads ?? null, numHeads, rows, columns, values};
}

// float32, little endian, which is what every machine with a browser is.
function fromBase64(text) {
  return new Float32Array(Uint8Array.from(atob(text), letter => letter.charCodeAt(0)).buffer);
}

export function headOf({values, rows, columns}, head) {
  return values.subarray(head * rows * columns, (head + 1) * rows * columns);
}

export const greatest = values => values.reduce((one, other) => Math.max(one, other), 0);

// At most `most` pixels a side, each the greatest of what it stands for, so that no bright spot is lost.
export function shrink(values, rows, columns, most) {
  const height = Math.min(rows, most), width = Math.min(columns, most);
  const small = new Float32Array(height * width);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const at = Math.floor((row * height) / rows) * width + Math.floor((column * width) / columns);
      small[at] = Math.max(small[at], values[row * columns + column]);
    }
  }
  return {values: small, rows: height, columns: width};
}

// The tokens along a map's sides. A decoder's are what it wrote, and before them its prompt if it continues that.
export function axes({kind, rows}, {tokens, target_tokens: target = []}) {
  if (kind === "encoder") return {queries: tokens, keys: tokens};
  if (kind === "cross") return {queries: target, keys: tokens};
  const isContinued = rows !== target.length;
  const own = isContinued ? [...tokens, ...target.map(token => ({...token, isWritten: true}))] : target;
  return {queries: own, keys: own};
}

// A reply whose tokens read as the characters they came from, not as the tokenizer names them; `asked` has the texts.
// Offsets count characters, of which a string's own indices count some twice.
export function readable(reply, asked) {
  const texts = {...asked, target: asked.target ?? reply.prediction?.text};
  const letters = Object.fromEntries(Object.entries(texts).map(([part, text]) => [part, Array.from(text ?? "")]));
  const read = token => ({...token, text: letters[token.part]?.slice(token.start, token.end).join("") || token.text});
  return {...reply, tokens: reply.tokens.map(read), target_tokens: reply.target_tokens?.map(read)};
}

// A token in few letters: spaces beside a word are left out, what would be invisible is made visible.
export function labelOf({text}, most = 16) {
  const shown = Array.from(text.trim() || (text || " ").replace(/[^\n]/g, "␣"));
  return shown.length > most ? shown.slice(0, most - 1).join("") + "…" : shown.join("").replaceAll("\n", "↵");
}
