// Calls to the HTTP functions. The cookie says who is asking.

/** An answer that is no success. `code` is stable; `retryAfter` is in seconds. */
export class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail || `the server answered ${status}`);
    this.status = status;
    this.code = problem.code || "unknown";
    this.retryAfter = problem.retryAfter || 0;
  }

  /** Whether the same request may succeed later. */
  get passing() {
    return this.status === 429 || this.status >= 500;
  }
}

/** Call a function; returns its JSON answer. Throws Refused, or TypeError where the server cannot be reached. */
export async function call(method, path, body) {
  const init = { method, cache: "no-store", headers: {} };
  if (body !== undefined) {
    init.headers["content-type"] = "application/json";
    init.body = JSON.stringify(body);
  }
  const response = await fetch(path, init);
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** The error that a response other than 2xx stands for. */
export async function refusal(response) {
  const problem = await response.json().catch(() => ({}));
  return new Refused(response.status, problem);
}

/** Resolve after so many milliseconds, or when `signal` is aborted. */
export function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

/** The wait before try number `attempt` (from 0): doubling from 250 ms to 8 s, spread so that clients do not march in step. */
export function backoff(attempt) {
  return Math.min(8000, 250 * 2 ** attempt) * (0.75 + Math.random() / 2);
}
