// The transcript as it grows: server-sent events read with fetch, picked up again where a connection broke.

import { Refused, backoff, pause, refusal } from "./api.js";
import { becomes } from "./visibility.js";

const SILENCE = 45_000; // ms; the server says something at least every 15 s, so this connection is dead
const UNSEEN = 60_000; // ms; browsers open six connections to a server: a tab that nobody sees gives its own back

/**
 * Follow a transcript from offset 0 until it is complete or `signal` is aborted. Throws Refused where the server does.
 *
 * `on` has data(bytes, offset), gap(document), state(document), end(document) and link("live" | "waiting").
 * data and gap may return a promise; nothing more is read until it resolves.
 */
export async function follow(session, on, signal) {
  let position = "0";
  for (let attempt = 0; !signal.aborted; attempt++) {
    await becomes("visible", signal);
    try {
      const events = connect(session, position, signal);
      for await (const event of events) {
        attempt = 0;
        if (event.id) position = event.id;
        if (event.type === "end") return on.end(JSON.parse(event.data));
        await handle(event, on);
        if (signal.aborted) return; // more may have been read, but nobody wants it any more
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused && !error.passing) throw error;
    }
    on.link("waiting");
    await pause(backoff(attempt), signal);
  }

  async function* connect(session, position, signal) {
    const connection = new AbortController();
    const stop = () => connection.abort();
    signal.addEventListener("abort", stop);
    let unseen = 0;
    const onVisibility = () => {
      clearTimeout(unseen);
      if (document.hidden) unseen = setTimeout(stop, UNSEEN);
    };
    document.addEventListener("visibilitychange", onVisibility);
    let watchdog = setTimeout(stop, SILENCE);
    try {
      const response = await fetch(`/terminal-stream-output/${session}`, {
        headers: { "last-event-id": position },
        cache: "no-store",
        signal: connection.signal,
      });
      if (!response.ok) throw await refusal(response);
      on.link("live");
      const reader = response.body.getReader();
      const parser = new EventParser();
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        clearTimeout(watchdog);
        yield* parser.feed(value);
        watchdog = setTimeout(stop, SILENCE);
      }
    } finally {
      clearTimeout(watchdog);
      clearTimeout(unseen);
      document.removeEventListener("visibilitychange", onVisibility);
      signal.removeEventListener("abort", stop);
      connection.abort();
    }
  }
}

function handle(event, on) {
  const body = JSON.parse(event.data);
  if (event.type === "problem") throw new Refused(body.status, body); // the stream breaks off here
  if (event.type === "message") return on.data(fromBase64(body.data), body.offset);
  return on[event.type]?.(body); // an event that this version does not know is skipped
}

/** Server-sent events (HTML standard, section 9.2) from bytes, however they are cut. */
export class EventParser {
  #decoder = new TextDecoder();
  #rest = "";
  #event = { type: "", data: [], id: "" };

  /** The events that `bytes` complete. */
  *feed(bytes) {
    const lines = (this.#rest + this.#decoder.decode(bytes, { stream: true })).split("\n");
    this.#rest = lines.pop();
    for (const line of lines) {
      const event = this.#line(line.endsWith("\r") ? line.slice(0, -1) : line);
      if (event) yield event;
    }
  }

  #line(line) {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
    if (field === "data") this.#event.data.push(value);
    else if (field === "event") this.#event.type = value;
    else if (field === "id") this.#event.id = value;
    return null;
  }

  #dispatch() {
    const { type, data, id } = this.#event;
    this.#event = { type: "", data: [], id: "" };
    return data.length ? { type: type || "message", data: data.join("\n"), id } : null;
  }
}

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}
