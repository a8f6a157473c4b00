// A translation, streamed, and where each of its words comes from, if the server can say.
import {ask, isAbort, Latest, stream} from "./api.js";
import {element, fillModels, say} from "./dom.js";
import {headOf, readable, unpack} from "./maps.js";
import {mapView} from "./mapview.js";
import {requestBox} from "./request.js";
import {Stopwatch} from "./stopwatch.js";

export function translationPanel(panel, models, can) {
  const form = panel.querySelector("form"), text = form.querySelector("textarea");
  const [button, stop] = [".send", ".stop"].map(name => form.querySelector(name));
  const output = panel.querySelector(".output"), stats = panel.querySelector(".stats");
  const error = output.parentElement.querySelector(".error");
  const select = fillModels(form.querySelector(".model"), models);
  const request = requestBox(panel.querySelector(":scope > .request"), "v1/generate");
  const alignment = alignmentBox(panel.querySelector(".alignment"));
  const latest = new Latest();

  async function translate() {
    const source = text.value.trim();
    if (!source) return;
    const signal = latest.start(), watch = new Stopwatch();
    const body = {model: select.value, prompt: source, stream: true};
    request.show(body, true);
    begin();
    try {
      for await (const event of stream("v1/generate", body, signal)) {
        output.append(event.text ?? "");
        if (event.token) watch.token();
        if (event.timing) {
          stats.textContent = watch.summary(event.timing, event.usage);
          request.timed(event.timing.total_seconds, watch.elapsed, event.usage);
        }
      }
      if (can.attention) alignment.show({text: source, model: select.value});
    } catch (failure) {
      if (!isAbort(failure)) say(error, failure.message);
      else if (latest.isCurrent(signal)) stats.textContent = "Stopped";
      if (latest.isCurrent(signal)) request.failed();
    }
    if (latest.isCurrent(signal)) end();
  }

  function begin() {
    output.replaceChildren();
    output.setAttribute("aria-busy", "true"); // read out when complete, not word by word
    stats.textContent = "";
    say(error, "");
    alignment.hide();
    stop.hidden = false;
  }

  function end() {
    output.setAttribute("aria-busy", "false");
    if (document.activeElement === stop) button.focus();
    stop.hidden = true;
  }

  form.onsubmit = event => {
    event.preventDefault();
    translate();
  };
  text.onkeydown = event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) translate();
  };
  stop.onclick = () => latest.stop();
  return {open() {}};
}

// The decoder's attention to a source of one sentence, which the server translates once more: the mean over its heads.
// Columns are what was read, rows what was written. A map's row is where the decoder looked as it read a token, to choose
// the next one: that one is shown beside it.
function alignmentBox(box) {
  const select = box.querySelector("select"), error = box.querySelector(".error");
  const view = mapView(box.querySelector(".map"), {queries: "Translation", keys: "Source"});
  const request = requestBox(box.querySelector(".request"), "v1/attention"), latest = new Latest();
  let reply = null, maps = [];

  function draw() {
    const map = maps[select.selectedIndex];
    const queries = [...reply.target_tokens.slice(1), END];
    view.show({keys: reply.tokens, queries, values: headOf(map, 0), rows: map.rows, columns: map.columns});
  }

  select.onchange = draw;
  return {
    hide() {
      latest.stop();
      box.hidden = true;
    },
    async show(wanted) {
      const body = {...wanted, kind: "cross", layers: "all", reduce: "mean", encoding: "base64"};
      request.show(body);
      try {
        const made = await ask("v1/attention", body, latest.start());
        reply = readable(made.reply, body);
        request.timed(reply.timing.total_seconds, made.roundTrip, reply.usage);
      } catch (failure) {
        if (isAbort(failure)) return;
        box.hidden = failure.status === 404;
        select.parentElement.hidden = true;
        view.clear();
        request.failed();
        return say(error, failure.message);
      }
      say(error, "");
      maps = reply.maps.map(unpack);
      select.replaceChildren(...maps.map(map => element("option", {textContent: layerName(map)})));
      select.selectedIndex = maps.length - 1;
      select.parentElement.hidden = box.hidden = false;
      draw();
    },
  };
}

const END = {text: "(end)", special: true}; // what ended the translation is not among a reply's tokens
const layerName = ({layer}) => (layer === null ? "all" : String(layer));
