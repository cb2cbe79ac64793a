// What is typed, sent in order and once: one request in flight, what comes meanwhile goes with the next.

import { Refused, backoff, call, pause } from "./api.js";

const MAX_BYTES = 64 * 1024; // the server's limit for one terminal-send-input

export class Typist {
  #waiting = [];
  #sending = false;
  #stopped = new AbortController();

  /** `onRefused(error)` is called once, when the session takes no more input. */
  constructor(session, onRefused) {
    this.session = session;
    this.onRefused = onRefused;
  }

  /** Send these bytes (a Uint8Array) after all earlier ones. */
  type(bytes) {
    if (this.#stopped.signal.aborted) return;
    this.#waiting.push(bytes);
    if (!this.#sending) void this.#send();
  }

  /** Forget what is not sent yet, and send nothing more. */
  stop() {
    this.#stopped.abort();
    this.#waiting = [];
  }

  async #send() {
    this.#sending = true;
    while (this.#waiting.length) {
      // The request id makes a repetition count once: an answer may get lost after the server took the input.
      const body = { sessionId: this.session, data: toBase64(this.#take()), requestId: crypto.randomUUID() };
      await this.#deliver(body);
    }
    this.#sending = false;
  }

  #take() {
    const all = concatenated(this.#waiting);
    this.#waiting = all.length > MAX_BYTES ? [all.subarray(MAX_BYTES)] : [];
    return all.subarray(0, MAX_BYTES);
  }

  async #deliver(body) {
    for (let attempt = 0; !this.#stopped.signal.aborted; attempt++) {
      try {
        return await call("POST", "/terminal-send-input", body);
      } catch (error) {
        if (error instanceof Refused && !error.passing) {
          this.stop();
          return this.onRefused(error);
        }
        await pause(Math.max(backoff(attempt), 1000 * (error.retryAfter || 0)), this.#stopped.signal);
      }
    }
  }
}

function concatenated(pieces) {
  if (pieces.length === 1) return pieces[0];
  const all = new Uint8Array(pieces.reduce((size, piece) => size + piece.length, 0));
  let end = 0;
  for (const piece of pieces) {
    all.set(piece, end);
    end += piece.length;
  }
  return all;
}

function toBase64(bytes) {
  if (bytes.toBase64) return bytes.toBase64();
  let binary = "";
  for (let i = 0; i < bytes.length; i += 0x8000) binary += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(binary);
}
