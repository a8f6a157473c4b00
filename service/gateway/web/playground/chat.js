// A conversation, its answers streamed. What has been said is sent along with every message.
import {isAbort, stream} from "./api.js";
import {element, fillModels, say} from "./dom.js";
import {requestBox} from "./request.js";
import {Stopwatch} from "./stopwatch.js";

export function chatPanel(panel, models) {
  const form = panel.querySelector(".composer"), text = form.querySelector("textarea");
  const log = panel.querySelector(".log"), live = panel.querySelector(".live");
  const [sendButton, stop, clear] = [".send", ".stop", ".clear"].map(name => form.querySelector(name));
  const settings = panel.querySelector(".settings"), select = fillModels(settings.querySelector(".model"), models);
  const request = requestBox(panel.querySelector(".request"), "v1/generate");
  let turns = [], running = null;

  async function send() {
    const said = text.value.trim();
    if (!said || running) return;
    if (turns.at(-1)?.role === "user") turns.pop(); // it was never answered
    turns.push({role: "user", content: said});
    follow(log, () => log.append(newTurn("user", said).node), true);
    text.value = "";
    await answer();
  }

  async function answer() {
    const turn = newTurn("assistant", ""), watch = new Stopwatch(), conversation = turns;
    for (const button of log.querySelectorAll(".error button")) button.remove();
    follow(log, () => log.append(turn.node), true);
    const body = {messages: withSystem(settings, turns), stream: true, ...sampling(settings)};
    if (models.length > 1) body.model = select.value;
    request.show(body, true);
    setRunning(new AbortController());
    try {
      for await (const event of stream("v1/generate", body, running.signal)) {
        follow(log, () => turn.add(event.text ?? ""));
        if (event.token) live.textContent = watch.token();
        if (event.timing) finish(turn, event, watch);
      }
    } catch (failure) {
      follow(log, () => fail(turn, failure, watch));
    }
    if (turn.said) conversation.push({role: "assistant", content: turn.said});
    setRunning(null);
  }

  function finish(turn, {usage, timing, finish_reasons: reasons}, watch) {
    const cut = reasons[0] === "length" ? " · cut at max tokens" : "";
    follow(log, () => turn.note(watch.summary(timing, usage) + cut));
    request.timed(timing.total_seconds, watch.elapsed, usage);
  }

  function fail(turn, failure, watch) {
    request.failed();
    if (isAbort(failure)) return turn.note(watch.hasBegun ? `Stopped · ${watch.summary()}` : "Stopped");
    turn.fail(failure.message, () => {
      if (running) return;
      turn.node.remove();
      if (turns.at(-1)?.role === "assistant") turns.pop();
      answer();
    });
  }

  function setRunning(controller) {
    running = controller;
    log.setAttribute("aria-busy", String(Boolean(controller))); // read out when complete, not word by word
    const hadFocus = document.activeElement === stop;
    stop.hidden = !controller;
    sendButton.disabled = Boolean(controller);
    live.textContent = "";
    if (hadFocus) text.focus();
  }

  form.onsubmit = event => {
    event.preventDefault();
    send();
  };
  text.onkeydown = event => {
    if (event.key === "Escape") running?.abort();
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  };
  stop.onclick = () => running?.abort();
  clear.onclick = () => {
    running?.abort();
    turns = [];
    log.replaceChildren();
    text.focus();
  };
  return {open() {}};
}

// Stay at the end while it grows, unless someone has scrolled up to read.
function follow(log, grow, always = false) {
  const isAtEnd = always || log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  grow();
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function newTurn(role, content) {
  const body = element("p", {className: "said", textContent: content});
  const note = element("p", {className: "stats"});
  const who = element("span", {className: "who", textContent: role === "user" ? "You" : "Model"});
  const node = element("div", {className: `turn ${role}`}, who, body, note);
  return {
    node,
    get said() {
      return body.textContent;
    },
    add: piece => body.append(piece),
    note: words => say(note, words),
    fail(words, again) {
      const button = element("button", {type: "button", className: "quiet", textContent: "Try again", onclick: again});
      node.append(element("p", {className: "error", role: "alert"}, words, " ", button));
    },
  };
}

function withSystem(settings, turns) {
  const content = settings.querySelector("[name=system]").value.trim();
  return content ? [{role: "system", content}, ...turns] : [...turns];
}

// What is filled in; the rest is the model's own.
function sampling(settings) {
  const inputs = [...settings.querySelectorAll("input")].filter(input => input.value !== "");
  return Object.fromEntries(inputs.map(input => [input.name, input.valueAsNumber]));
}
