// Everything around the terminal: the badge, the notice, the curtain, the list of sessions. It only shows.

const byId = (id) => document.getElementById(id);

const NAMES = {
  requested: "Requested",
  queued: "In the queue",
  starting: "Starting",
  ready: "Ready",
  closing: "Closing",
  closed: "Closed",
  failed: "Failed",
  lost: "Lost",
};
const ENDED = new Set(["closed", "failed", "lost"]);

const ordinal = (n) => `${n}${["th", "st", "nd", "rd"][n % 100 > 10 && n % 100 < 14 ? 0 : n % 10] ?? "th"}`;
const clock = (time) => new Date(time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });

export const hasEnded = (status) => ENDED.has(status.state);
export const takesInput = (status) => !hasEnded(status) && status.state !== "closing";

/** The badge and the curtain over the terminal, for a session's status. */
export function showStatus(status) {
  const queued = status.state === "queued" && status.position;
  showBadge(status.state, queued ? `${ordinal(status.position)} in the queue` : NAMES[status.state]);
  byId("end").disabled = !takesInput(status);
  if (queued) showCurtain(`You are ${ordinal(status.position)} in the queue`, "A terminal opens here as soon as there is room.");
  else if (status.state === "queued") showCurtain("In the queue", "A terminal opens here as soon as there is room.");
  else if (["requested", "starting"].includes(status.state)) showCurtain("Starting your terminal", "");
  else hideCurtain();
}

/** The badge alone; `state` picks its colour. */
export function showBadge(state, text) {
  const badge = byId("badge");
  badge.dataset.state = state;
  const label = badge.querySelector("span");
  if (label.textContent !== text) label.textContent = text;
}

/** A line above the terminal: kind is "plain", "warning" or "error"; `action` is {label, run}. */
export function showNotice(kind, text, action) {
  const notice = byId("notice");
  const button = notice.querySelector("button");
  notice.dataset.kind = kind;
  const line = notice.querySelector("span");
  if (line.textContent !== text) line.textContent = text;
  button.hidden = !action;
  button.textContent = action?.label ?? "";
  button.onclick = action?.run ?? null;
  notice.hidden = false;
}

export function hideNotice() {
  byId("notice").hidden = true;
}

/** What a session's end, or its coming end, means to the person in front of it; null where there is nothing to say. */
export function remarkOn(status) {
  if (status.state === "closed") return ["plain", `${sentence(status)} What it printed stays here.`];
  if (status.state === "failed") return ["error", sentence(status)];
  if (status.state === "lost") return ["error", `${sentence(status)} What it had printed stays here.`];
  if (status.warning && takesInput(status))
    return ["warning", `Nothing was typed for a while: this session closes at ${clock(status.warning)} unless you go on.`];
  return null;
}

/** The reason of a status as a sentence. */
function sentence(status) {
  const text = status.reason || `The session is ${status.state}.`;
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

function showCurtain(title, text) {
  const curtain = byId("curtain");
  curtain.querySelector("h1").textContent = title;
  curtain.querySelector("p").textContent = text;
  curtain.hidden = false;
}

export function hideCurtain() {
  byId("curtain").hidden = true;
}

/** How the stream is doing: "live", "waiting" or "closed". */
export function showLink(state) {
  const link = byId("link");
  link.dataset.link = state;
  link.textContent = { live: "Connected", waiting: "Reconnecting", closed: "Transcript complete" }[state];
}

/** Whether the terminal is still being filled with what was printed before. */
export function showReplay(replaying) {
  byId("screen").ariaBusy = String(replaying);
}

export function showSize({ rows, cols }) {
  byId("size").textContent = `${cols} × ${rows}`;
}

/** The list of live sessions, the current one chosen; `current` is its status, and it may have ended. */
export function showSessions(sessions, current) {
  const list = byId("sessions");
  const shown = sessions.some((session) => session.sessionId === current.sessionId) ? sessions : [current, ...sessions];
  const options = shown.map((session) => {
    const label = `${session.sessionId.slice(0, 6)} · since ${clock(session.createdAt)}`;
    return new Option(label, session.sessionId, false, session.sessionId === current.sessionId);
  });
  list.replaceChildren(...options);
  list.disabled = options.length < 2;
}
