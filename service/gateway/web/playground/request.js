// Under every panel: how long its last call took, and the call itself to copy, as curl and as Python.
import {hasKey} from "./api.js";
import {element, milliseconds} from "./dom.js";

const quoted = text => `'${text.replaceAll("'", "'\\''")}'`;

export function curlOf(url, body, {isStream = false, withKey = false} = {}) {
  const key = withKey ? ' \\\n    -H "Authorization: Bearer $ATTND_API_KEY"' : "";
  return `curl -s${isStream ? "N" : ""} ${url}${key} \\\n    -d ${quoted(JSON.stringify(body))}`;
}

// A JSON value as Python writes it.
export function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object")
    return `{${Object.entries(value).map(pair => pair.map(literal).join(": ")).join(", ")}}`;
  return JSON.stringify(value);
}

export function pythonOf(url, body, {isStream = false, withKey = false} = {}) {
  const imports = ["json", ...(withKey ? ["os"] : []), "urllib.request"].map(name => `import ${name}\n`).join("");
  const key = withKey ? ', "authorization": "Bearer " + os.environ["ATTND_API_KEY"]' : "";
  const request = [
    `body = ${literal(body)}`,
    `headers = {"content-type": "application/json"${key}}`,
    `request = urllib.request.Request("${url}", json.dumps(body).encode(), headers)`,
  ].join("\n");
  const print = isStream ? "for line in reply:\n        print(line.decode().strip())" : "print(json.load(reply))";
  return `${imports}\n${request}\nwith urllib.request.urlopen(request) as reply:\n    ${print}\n`;
}

async function copy(text, box) {
  try {
    await navigator.clipboard.writeText(text);
    return "Copied";
  } catch {
    // Not allowed, or not a secure context: leave it selected, so that one key copies it.
    getSelection().selectAllChildren(box);
    return "Selected";
  }
}

function snippet(name) {
  const box = element("pre", {tabIndex: 0, "aria-label": `The request as ${name}`});
  const button = element("button", {type: "button", className: "quiet", textContent: `Copy ${name}`});
  button.onclick = async () => {
    button.textContent = await copy(box.textContent, box);
    setTimeout(() => void (button.textContent = `Copy ${name}`), 1500);
  };
  return {node: element("div", {className: "snippet"}, box, button), show: text => void (box.textContent = text)};
}

// `show` a call that is being made, then `timed` or `failed`, what came of it.
export function requestBox(host, path) {
  const [curl, python] = [snippet("curl"), snippet("Python")];
  const timing = element("p", {className: "timing"});
  const about = element("summary", {}, "Request ", element("code", {textContent: `POST /${path}`}));
  const details = element("details", {hidden: true}, about, curl.node, python.node);
  host.append(timing, details);
  return {
    show(body, isStream = false) {
      const url = new URL(path, document.baseURI).href;
      const options = {isStream, withKey: hasKey()};
      curl.show(curlOf(url, body, options));
      python.show(pythonOf(url, body, options));
      details.hidden = false;
    },
    failed: () => void (timing.textContent = ""),
    timed(total, roundTrip, usage) {
      const tokens = usage ? ` · ${numTokens(usage)}` : "";
      const server = total === undefined ? "" : `${milliseconds(total)} on the server · `;
      timing.textContent = `${server}${milliseconds(roundTrip)} round trip${tokens}`;
    },
  };
}

function numTokens({prompt_tokens: read, completion_tokens: written, cached_tokens: cached}) {
  const known = cached ? ` (${cached} of them cached)` : "";
  return `${read} tokens read${known}${written === undefined ? "" : `, ${written} written`}`;
}
