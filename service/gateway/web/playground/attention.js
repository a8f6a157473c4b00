// What to ask for, of which model; the explorer shows what comes.
import {ask, isAbort, Latest} from "./api.js";
import {fillModels, say} from "./dom.js";
import {explorerOf} from "./explorer.js";
import {readable} from "./maps.js";
import {requestBox} from "./request.js";

const HEADS = {none: "", mean: ", mean of the heads", max: ", maximum of the heads", rollout: ", rollout"};
const SECOND = {
  classification: ["text_pair", "Second text, for models of pairs"],
  translation: ["target", "A translation of your own, instead of the model’s"],
};

export function attentionPanel(panel, models) {
  const form = panel.querySelector(".ask"), text = form.querySelector("textarea"), error = form.querySelector(".error");
  const select = fillModels(form.querySelector(".model"), models);
  const [reduce, layers] = [".reduce", ".layers"].map(name => form.querySelector(name));
  const scale = panel.querySelector(".scale"), prediction = panel.querySelector(".prediction");
  const request = requestBox(panel.querySelector(".request"), "v1/attention");
  const written = form.querySelector(".written"), second = secondText(form.querySelector(".second"));
  const explorer = explorerOf(panel.querySelector(".explorer"), () => scale.value);
  const latest = new Latest();
  const taskOf = () => models.find(model => model.id === select.value)?.task;

  async function show() {
    const wanted = {model: select.value, reduce: reduce.value, encoding: "base64"};
    const body = {text: text.value, ...second.field(taskOf()), ...wanted};
    if (reduce.value !== "rollout") body.layers = layers.value;
    if (!written.hidden) body.generate = {max_tokens: written.querySelector("input").valueAsNumber || 1};
    request.show(body);
    explorer.busy(true);
    try {
      const {reply, roundTrip} = await ask("v1/attention", body, latest.start());
      say(error, "");
      scale.parentElement.hidden = false;
      prediction.textContent = predicted(reply.prediction);
      request.timed(reply.timing.total_seconds, roundTrip, reply.usage);
      explorer.show(readable(reply, body), HEADS[body.reduce]);
    } catch (failure) {
      if (isAbort(failure)) return;
      request.failed();
      explorer.hide();
      scale.parentElement.hidden = true;
      prediction.textContent = "";
      say(error, failure.message);
    }
    explorer.busy(false);
  }

  form.onsubmit = event => {
    event.preventDefault();
    show();
  };
  form.onkeydown = event => {
    if (event.key === "Enter" && event.target.matches("textarea") && (event.ctrlKey || event.metaKey)) show();
  };
  reduce.onchange = () => {
    layers.disabled = reduce.value === "rollout"; // it goes through all of them
    show();
  };
  layers.onchange = show;
  function suit() {
    second.suit(taskOf());
    written.hidden = taskOf() !== "generation";
  }

  select.onchange = () => {
    suit();
    show();
  };
  scale.onchange = explorer.draw;
  suit();
  let isOpened = false;
  return {
    open() {
      if (!isOpened) show();
      isOpened = true;
    },
  };
}

function secondText(details) {
  const box = details.querySelector("textarea");
  return {
    suit(task) {
      details.hidden = !(task in SECOND);
      details.querySelector("summary").textContent = box.ariaLabel = SECOND[task]?.[1] ?? "";
    },
    field: task => (box.value && task in SECOND ? {[SECOND[task][0]]: box.value} : {}),
  };
}

// In words what the maps belong to: the text that was written, or the label.
function predicted({scores, text}) {
  return scores ? `Predicted: ${scores[0].label} ${scores[0].score.toFixed(4)}` : `Written: ${text}`;
}
