// How fast tokens come, as seen from here.
import {milliseconds} from "./dom.js";

export class Stopwatch {
  #begun = performance.now();
  #first = 0;
  #last = 0;
  #num = 0;

  get hasBegun() {
    return this.#num > 0;
  }

  get elapsed() {
    return (performance.now() - this.#begun) / 1000;
  }

  // One more token is here; says how it goes.
  token() {
    this.#last = performance.now();
    this.#first ||= this.#last;
    this.#num += 1;
    return this.#rate();
  }

  #rate() {
    const seconds = (this.#last - this.#first) / 1000;
    return this.#num > 1 && seconds > 0 ? `${((this.#num - 1) / seconds).toFixed(1)} tokens/s` : "";
  }

  // The rate is the server's own once it has said it: the network bunches tokens.
  summary(timing, usage) {
    const written = usage?.completion_tokens ?? this.#num;
    const served = timing?.decode_seconds > 0 && written > 1 ? (written - 1) / timing.decode_seconds : 0;
    const rate = served ? `${served.toFixed(1)} tokens/s` : this.#rate();
    const first = this.hasBegun ? `first token after ${milliseconds((this.#first - this.#begun) / 1000)}` : "";
    return [first, rate, `${written} ${written === 1 ? "token" : "tokens"}`].filter(Boolean).join(" · ");
  }
}
