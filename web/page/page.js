// One session at a time on one page. The address carries its id, so that a reload comes back to it.

import { Refused, call } from "./api.js";
import { Typist } from "./input.js";
import { Screen } from "./screen.js";
import { follow } from "./stream.js";
import { becomes } from "./visibility.js";
import * as view from "./view.js";

const RESIZE_PAUSE = 150; // ms without a change before the new size is sent
const CATCH_UP = 250; // ms for what was printed after the status had last counted bytes, a second or so ago
const REMEMBERED = "pigeon.session";

/** One session, shown: its stream, its input and its size. Leaving it stops all three. */
class Shown {
  #leaving = new AbortController();
  #live = false; // whether what comes now is new, or the replay of what was there before this page
  #position = 0;
  #counted = 0; // bytes of the transcript when this page came to it
  #catchUpTimer = 0;
  #resizeTimer = 0;

  constructor(status, fresh) {
    this.id = status.sessionId;
    this.status = status;
    this.sent = { rows: status.rows, cols: status.cols };
    this.#live = fresh;
    this.#counted = status.usage.bytes;
    view.showReplay(!fresh);
    this.typist = new Typist(this.id, (error) => refused(error));
    this.update(status);
    view.showSize(screen.size);
    void this.#sendSize(screen.size);
    void this.#answer();
    void this.#follow();
  }

  leave() {
    this.#leaving.abort();
    this.typist.stop();
    clearTimeout(this.#resizeTimer);
    clearTimeout(this.#catchUpTimer);
  }

  update(status) {
    const before = this.status.state;
    this.status = status;
    view.showStatus(status);
    const remark = view.remarkOn(status);
    if (remark) view.showNotice(...remark, view.hasEnded(status) ? { label: "New session", run: startNew } : undefined);
    else view.hideNotice();
    if (view.hasEnded(status)) this.typist.stop();
    if (before !== status.state) void listSessions();
  }

  resize(size) {
    view.showSize(size);
    clearTimeout(this.#resizeTimer);
    this.#resizeTimer = setTimeout(() => void this.#sendSize(size), RESIZE_PAUSE);
  }

  async #sendSize(size) {
    if (!view.takesInput(this.status) || (size.rows === this.sent.rows && size.cols === this.sent.cols)) return;
    this.sent = size;
    await call("POST", "/terminal-resize", { sessionId: this.id, ...size }).catch(() => {
      this.sent = {}; // the next change of size, or the next reload, tries again
    });
  }

  /** Have this tab answer programs' questions about the terminal while it is seen and no other tab does. */
  async #answer() {
    screen.answers = false;
    const signal = this.#leaving.signal;
    const hold = async () => {
      screen.answers = true;
      await becomes("hidden", signal);
      screen.answers = false;
    };
    while (!signal.aborted) {
      await becomes("visible", signal);
      await navigator.locks.request(`pigeon.${this.id}`, { signal }, hold).catch(() => {}); // left while it waited
    }
  }

  async #follow() {
    this.#catchUp();
    const on = {
      data: (bytes, offset) => this.#draw(bytes, offset),
      gap: ({ length, reason }) => screen.remark(`[${length ?? "an unknown number of"} bytes were given up: ${reason}]`),
      state: (status) => this.update(status),
      link: (state) => view.showLink(state),
      end: () => this.#end(),
    };
    try {
      await follow(this.id, on, this.#leaving.signal);
    } catch (error) {
      refused(error);
    }
  }

  #draw(bytes, offset) {
    this.#position = offset + bytes.length;
    this.#catchUp();
    return screen.write(bytes, !this.#live);
  }

  /** Take what comes for new once the replay has passed the bytes that the status counts, and a little longer. */
  #catchUp() {
    if (this.#live || this.#catchUpTimer || this.#position < this.#counted) return;
    this.#catchUpTimer = setTimeout(() => {
      this.#live = true;
      view.showReplay(false);
    }, CATCH_UP);
  }

  async #end() {
    view.showLink("closed");
    screen.freeze();
    const status = await call("GET", `/terminal-get-status/${this.id}`).catch(() => this.status);
    if (!this.#leaving.signal.aborted) this.update(status);
  }
}

let shown = null;
let turns = 0; // of showing a session: the last one counts

const screen = new Screen(document.getElementById("screen"), {
  input: (bytes) => shown?.typist.type(bytes),
  resize: (size) => shown?.resize(size),
  title: (text) => (document.title = text ? `${text} · pigeon` : "pigeon"),
});

function refused(error) {
  if (error.status === 401) {
    view.showBadge("lost", "Signed out");
    const again = { label: "How to get in", run: () => location.assign("/") };
    view.showNotice("error", "This browser's access has ended.", again);
  } else if (error.code !== "session_ended") {
    view.showNotice("error", `${error.message}.`, { label: "New session", run: startNew });
  }
}

async function listSessions() {
  const answer = await call("GET", "/terminal-list-sessions?live=true&limit=100").catch(() => null);
  if (answer && shown) view.showSessions(answer.sessions, shown.status);
}

/** Show a session; `fresh` if this page has just created it. Throws Refused if there is none of that id. */
async function show(id, fresh) {
  const status = await call("GET", `/terminal-get-status/${id}`);
  const turn = ++turns;
  shown?.leave();
  shown = null; // what xterm still answers to its programs is for nobody
  await screen.clear();
  if (turn !== turns) return;
  view.hideNotice();
  document.title = "pigeon";
  localStorage.setItem(REMEMBERED, id);
  history.replaceState(null, "", `#${id}`);
  shown = new Shown(status, fresh);
  screen.terminal.focus();
  void listSessions();
}

async function create(reconnect) {
  const body = { reconnect, requestId: crypto.randomUUID(), ...screen.size };
  const { sessionId } = await call("POST", "/terminal-create-session", body);
  await show(sessionId, !reconnect);
}

async function startNew() {
  await create(false).catch(refused);
}

async function start() {
  const wanted = location.hash.slice(1) || localStorage.getItem(REMEMBERED);
  try {
    if (wanted && (await shownIfLive(wanted))) return;
    await create(true);
  } catch (error) {
    refused(error);
  }
}

/** A session in the address is shown even if it has ended; a remembered one only while it lives. */
async function shownIfLive(id) {
  try {
    const status = await call("GET", `/terminal-get-status/${encodeURIComponent(id)}`);
    if (!location.hash && view.hasEnded(status)) return false;
    await show(status.sessionId, false);
    return true;
  } catch (error) {
    if (error instanceof Refused && error.status === 404) return false;
    throw error;
  }
}

document.getElementById("new").addEventListener("click", () => void startNew());
document.getElementById("end").addEventListener("click", () => {
  if (shown) void call("DELETE", `/terminal-cleanup-session/${shown.id}`).catch(refused);
});
document.getElementById("sessions").addEventListener("change", (event) => void show(event.target.value, false).catch(refused));
document.getElementById("sessions").addEventListener("focus", () => void listSessions());
addEventListener("hashchange", () => {
  if (location.hash.slice(1) !== shown?.id) void start();
});
addEventListener("keydown", (event) => {
  if (event.key !== "F6") return;
  event.preventDefault();
  if (document.activeElement?.closest(".screen")) document.getElementById("new").focus();
  else screen.terminal.focus();
});

void start();
