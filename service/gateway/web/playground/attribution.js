// A text whose tokens are tinted by what each contributes to the label, or by its share of what was looked at.
import {alongList, element, rove} from "./dom.js";

export function showAttribution(box, text, {label, tokens, scores, method}) {
  const host = box.querySelector(".attribution"), readout = box.querySelector(".readout");
  const most = Math.max(...scores.map(Math.abs), 1e-9);
  const letters = Array.from(text); // offsets count characters, a string's own indices half of some
  const nodes = [], marks = [];
  let at = 0;
  for (const [index, token] of tokens.entries()) {
    if (token.end <= token.start || token.start < at) continue;
    nodes.push(letters.slice(at, token.start).join(""));
    const word = letters.slice(token.start, token.end).join(""), score = scores[index];
    const mark = newMark(word, score, most, meaningOf(method, label, score));
    mark.onpointerenter = mark.onfocus = () => void (readout.textContent = mark.title);
    nodes.push(mark);
    marks.push(mark);
    at = token.end;
  }
  host.replaceChildren(...nodes, letters.slice(at).join(""));
  rove(host, marks, alongList(marks.length));
  const hint = "Point at a token, or move to it with Tab and the arrow keys, for its number.";
  readout.textContent = marks.length ? hint : "";
  box.querySelector(".legend").replaceChildren(...(marks.length ? legend(method, label, most) : []));
}

// A rollout has no sign: it says where the model looked, not what that spoke for.
function meaningOf(method, label, score) {
  if (method === "rollout") return "of what was looked at";
  return score < 0 ? `against ${label}` : `for ${label}`;
}

const signed = score => (score < 0 ? "\u2212" : "+") + Math.abs(score).toFixed(4);

function newMark(word, score, most, meaning) {
  const title = `“${word}”: ${signed(score)}, ${meaning}`;
  const mark = element("span", {className: score < 0 ? "mark against" : "mark for", role: "note", title}, word);
  mark.setAttribute("aria-label", title);
  mark.style.setProperty("--much", `${Math.round((Math.abs(score) / most) * 100)}%`);
  return mark;
}

function legend(method, label, most) {
  const key = (kind, words) => {
    const mark = element("span", {className: `mark ${kind}`, textContent: words});
    mark.style.setProperty("--much", "70%");
    return mark;
  };
  const kinds = method === "rollout" ? [["for", 1]] : [["for", 1], ["against", -1]];
  return [...kinds.map(([kind, sign]) => key(kind, meaningOf(method, label, sign))), `strongest: ${most.toFixed(4)}`];
}
