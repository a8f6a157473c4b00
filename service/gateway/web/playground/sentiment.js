// Scores as you type, and what each token contributes to them where the server can say.
import {ask, isAbort, Latest} from "./api.js";
import {showAttribution} from "./attribution.js";
import {element, fillModels, say, whenQuiet} from "./dom.js";
import {requestBox} from "./request.js";

const EXAMPLES = {
  Praise: "a gripping, funny film that never talks down to its audience",
  Disappointment: "two hours of my life I will not get back",
  "Something between": "not bad at all, though it could have been shorter",
};

export function sentimentPanel(panel, models, can) {
  const text = panel.querySelector("textarea"), error = panel.querySelector(".error");
  const select = fillModels(panel.querySelector(".model"), models);
  const request = requestBox(panel.querySelector(":scope > .request"), "v1/classify");
  const explain = explainBox(panel.querySelector(".explain"), can.explain);
  const latest = new Latest();

  async function classify() {
    const signal = latest.start();
    explain.forget();
    const body = {input: text.value, ...(models.length > 1 && {model: select.value})};
    request.show(body);
    try {
      const {reply, roundTrip} = await ask("v1/classify", body, signal);
      say(error, "");
      showScores(panel, reply.results[0], models.find(model => model.id === reply.model)?.labels);
      request.timed(reply.timing.total_seconds, roundTrip, reply.usage);
      explain.soon(text.value, reply.model);
    } catch (failure) {
      if (isAbort(failure)) return;
      request.failed();
      say(error, failure.message);
      clearScores(panel);
    }
  }

  const soon = whenQuiet(classify, 80);
  text.oninput = soon;
  select.onchange = classify;
  addExamples(panel.querySelector(".examples"), text, classify);
  return {open: classify};
}

function addExamples(host, text, classify) {
  for (const [name, example] of Object.entries(EXAMPLES)) {
    const button = element("button", {type: "button", className: "quiet", title: example}, name);
    button.onclick = () => {
      text.value = example;
      classify();
    };
    host.append(button);
  }
}

// In the model's own order of labels, so that bars grow and shrink in place.
function showScores(panel, scores, labels = []) {
  const ordered = scores.toSorted((one, other) => labels.indexOf(one.label) - labels.indexOf(other.label));
  const bars = panel.querySelector(".bars");
  const names = [...bars.querySelectorAll(".name")].map(node => node.textContent);
  if (names.join() !== ordered.map(one => one.label).join()) bars.replaceChildren(...ordered.map(newBar));
  for (const [at, bar] of [...bars.children].entries()) {
    const {score} = ordered[at];
    bar.querySelector(".number").textContent = score.toFixed(4);
    bar.querySelector(".fill").style.width = `${Math.max(0, Math.min(1, score)) * 100}%`;
    bar.classList.toggle("best", ordered[at] === best(scores));
  }
  panel.querySelector(".verdict").textContent = best(scores).label;
}

const best = scores => scores.reduce((one, other) => (other.score > one.score ? other : one));

function newBar({label}) {
  const track = element("span", {className: "track", "aria-hidden": "true"}, element("span", {className: "fill"}));
  const name = element("span", {className: "name", textContent: label});
  return element("li", {}, name, track, element("span", {className: "number"}));
}

function clearScores(panel) {
  panel.querySelector(".verdict").textContent = "\u00a0";
  panel.querySelector(".bars").replaceChildren();
}

// Asked for only once typing has paused: an explanation costs as much as many classifications.
function explainBox(box, isServed) {
  const method = box.querySelector("select"), latest = new Latest();
  const request = requestBox(box.querySelector(".request"), "v1/explain");
  let wanted = null, timer = 0;

  async function explain() {
    const signal = latest.start(), body = {...wanted, method: method.value};
    request.show(body);
    try {
      const {reply, roundTrip} = await ask("v1/explain", body, signal);
      box.hidden = false;
      request.timed(reply.timing.total_seconds, roundTrip, reply.usage);
      showAttribution(box, wanted.text, reply);
    } catch (failure) {
      if (isAbort(failure)) return;
      request.failed();
      box.hidden = failure.status === 404 || failure.status === 405;
      showAttribution(box, failure.message, {tokens: [], scores: [], label: "", method: ""});
    }
  }

  method.onchange = explain;
  return {
    forget() {
      clearTimeout(timer);
      latest.stop();
    },
    soon(text, model) {
      if (!isServed) return;
      wanted = {text, model};
      timer = setTimeout(explain, 300);
    },
  };
}
