// Calls to the server this page came from. Failures are ApiErrors, whose message is for people.

export class ApiError extends Error {
  constructor(words, status) {
    super(words);
    this.status = status;
  }
}

let key = ""; // in memory only
const lockedOut = new EventTarget();

export const hasKey = () => key !== "";
export const setKey = value => void (key = value);
export const onLockedOut = act => lockedOut.addEventListener("401", act);

const LEADS = {
  400: "The request was refused",
  404: "Not served here",
  413: "Too much at once",
  422: "The request was refused",
  501: "This model cannot do that",
  503: "The server is not ready",
  504: "It took too long",
};

function wordsFor(status, error, retryAfter) {
  const told = typeof error?.message === "string" ? error.message : "";
  if (status === 401) return hasKey() ? "The server does not take this API key." : "The server asks for an API key.";
  const later = retryAfter ? ` Try again in ${retryAfter} s.` : "";
  const lead = status === 429 ? "The server is busy" : LEADS[status] ?? "The server failed";
  return `${lead}${told ? `: ${told}` : ""}.`.replace(/[.]+$/, ".") + later;
}

async function send(path, body, signal) {
  const headers = {...(body && {"content-type": "application/json"}), ...(key && {authorization: `Bearer ${key}`})};
  const options = {method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body)};
  const reply = await fetch(path, options).catch(error => {
    throw error.name === "AbortError" ? error : new ApiError("The server cannot be reached. Is it still running?", 0);
  });
  if (reply.ok) return reply;
  const sent = await reply.json().catch(() => ({}));
  const error = new ApiError(wordsFor(reply.status, sent.error, reply.headers.get("retry-after")), reply.status);
  if (reply.status === 401) lockedOut.dispatchEvent(new Event("401"));
  throw error;
}

// The reply, and the seconds until all of it was here.
export async function ask(path, body, signal) {
  const begun = performance.now();
  const reply = await (await send(path, body, signal)).json();
  signal?.throwIfAborted();
  return {reply, roundTrip: (performance.now() - begun) / 1000};
}

// The events of a streamed reply as they come. An error among them is thrown, and so is an end too soon.
export async function* stream(path, body, signal) {
  const reply = await send(path, body, signal);
  let rest = "", isWhole = false;
  for await (const piece of pieces(reply.body.pipeThrough(new TextDecoderStream()).getReader())) {
    const blocks = (rest + piece).split("\n\n");
    rest = blocks.pop();
    for (const data of blocks.filter(block => block.startsWith("data: ")).map(block => block.slice(6))) {
      signal?.throwIfAborted(); // what had come in by then is not wanted either
      if (data === "[DONE]") isWhole = true;
      else yield checked(JSON.parse(data));
    }
  }
  if (!isWhole) throw new ApiError("The connection ended before the answer did.", 0);
}

function checked(event) {
  if (event.error) throw new ApiError(wordsFor(500, event.error), 500);
  return event;
}

async function* pieces(reader) {
  try {
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError("The connection broke before the answer was complete.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Gives a signal for a new call and aborts the one before: its reply can no longer overwrite a newer one.
export class Latest {
  #controller = null;

  start() {
    this.stop();
    this.#controller = new AbortController();
    return this.#controller.signal;
  }

  stop() {
    this.#controller?.abort();
  }

  isCurrent(signal) {
    return this.#controller?.signal === signal;
  }
}

export const isAbort = error => error.name === "AbortError";
