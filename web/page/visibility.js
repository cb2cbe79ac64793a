// Whether anybody can see this tab.

/** Resolve as soon as the page is "visible" or "hidden", as asked, or `signal` is aborted. */
export function becomes(state, signal) {
  return new Promise((resolve) => {
    const look = () => {
      if (document.visibilityState !== state && !signal.aborted) return;
      document.removeEventListener("visibilitychange", look);
      signal.removeEventListener("abort", look);
      resolve();
    };
    document.addEventListener("visibilitychange", look);
    signal.addEventListener("abort", look);
    look();
  });
}
