// Which panels there are, by what the server serves, and which of them is shown, by the address.
import {ask, onLockedOut, setKey} from "./api.js";
import {attentionPanel} from "./attention.js";
import {chatPanel} from "./chat.js";
import {element} from "./dom.js";
import {sentimentPanel} from "./sentiment.js";
import {translationPanel} from "./translation.js";

const PANELS = {
  sentiment: {name: "Sentiment", tasks: ["classification"], make: sentimentPanel},
  chat: {name: "Chat", tasks: ["generation"], make: chatPanel},
  translation: {name: "Translation", tasks: ["translation"], make: translationPanel},
  attention: {
    name: "Attention", tasks: ["classification", "generation", "translation"], make: attentionPanel, needs: "attention",
  },
};

const notice = document.getElementById("notice"), keyForm = document.getElementById("key-form");
const panels = new Map();
let shown = "";

// What the server's own description lists: asking a path that is not there would be an error in everyone's log.
async function endpoints() {
  const {reply} = await ask("openapi.json").catch(() => ({reply: {}}));
  const paths = reply.paths ?? {};
  return {attention: "/v1/attention" in paths, explain: "/v1/explain" in paths};
}

async function start() {
  notice.replaceChildren();
  try {
    const [{reply}, can] = await Promise.all([ask("v1/models"), endpoints()]);
    keyForm.hidden = true;
    build(reply.data, can);
  } catch (failure) {
    tell(failure.message);
  }
}

function tell(words) {
  const again = element("button", {type: "button", className: "quiet", textContent: "Try again", onclick: start});
  keyForm.querySelector(".words").textContent = words;
  notice.replaceChildren(...(keyForm.hidden ? [element("p", {className: "notice"}, words, " ", again)] : []));
}

function build(models, can) {
  const absent = [];
  for (const [id, {name, tasks, make, needs}] of Object.entries(PANELS)) {
    const able = models.filter(model => tasks.includes(model.task))
      .toSorted((one, other) => tasks.indexOf(one.task) - tasks.indexOf(other.task));
    if (needs && !can[needs]) absent.push(`${name} (the server has no /v1/${needs})`);
    else if (!able.length) absent.push(`${name} (no model for ${tasks[0]})`);
    else if (!panels.has(id)) panels.set(id, make(document.getElementById(`panel-${id}`), able, can));
  }
  const links = [...panels.keys()].map(id => element("a", {href: `#${id}`, textContent: PANELS[id].name}));
  document.getElementById("panels").replaceChildren(...links);
  document.getElementById("served").textContent = `Served here: ${models.map(describe).join(", ") || "nothing yet"}.`;
  document.getElementById("absent").textContent = absent.length ? `Not served here: ${absent.join(", ")}.` : "";
  shown = "";
  route();
}

function describe({id, precision, limits}) {
  const facts = [precision, limits?.max_tokens ? `${limits.max_tokens} tokens` : ""].filter(Boolean);
  return facts.length ? `${id} (${facts.join(", ")})` : id;
}

function route() {
  const wanted = location.hash.slice(1), id = panels.has(wanted) ? wanted : shown || panels.keys().next().value;
  if (id === undefined || id === shown) return;
  shown = id;
  for (const one of Object.keys(PANELS)) document.getElementById(`panel-${one}`).hidden = one !== id;
  for (const link of document.querySelectorAll("#panels a")) {
    if (link.hash === `#${id}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${PANELS[id].name} · attnd playground`;
  panels.get(id).open();
}

onLockedOut(() => {
  keyForm.hidden = false;
});
keyForm.onsubmit = event => {
  event.preventDefault();
  setKey(document.getElementById("key").value);
  start();
};
addEventListener("hashchange", route);
start();
