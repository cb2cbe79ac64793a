// The terminal on the page: xterm.js, its looks and size, and which of its own answers are sent.

import { FitAddon } from "/vendor/addon-fit-0.11.0/addon-fit.mjs";
import { Terminal } from "/vendor/xterm-6.0.0/xterm.mjs";

const MAX_UNPARSED = 1024 * 1024; // bytes given to xterm and not drawn yet; reading waits beyond it
const ANEW = Uint8Array.of(0x18, 0x18, 0x1b, 0x63); // ends what was cut within a character or a sequence, and resets

const THEME = {
  background: "#12161c",
  foreground: "#d7dee8",
  cursor: "#8fd3c5",
  cursorAccent: "#12161c",
  selectionBackground: "#35506a",
  overviewRulerBorder: "#12161c",
  scrollbarSliderBackground: "rgba(147, 160, 176, 0.16)",
  scrollbarSliderHoverBackground: "rgba(147, 160, 176, 0.30)",
  scrollbarSliderActiveBackground: "rgba(147, 160, 176, 0.42)",
  black: "#2b333f",
  red: "#f08080",
  green: "#86d08f",
  yellow: "#e3bd6c",
  blue: "#7fb2f0",
  magenta: "#c79bea",
  cyan: "#7fd0d6",
  white: "#cfd7e1",
  brightBlack: "#7a8797",
  brightRed: "#ff9d9d",
  brightGreen: "#a5e5ad",
  brightYellow: "#f2d391",
  brightBlue: "#a3caf8",
  brightMagenta: "#dab9f3",
  brightCyan: "#a5e4e8",
  brightWhite: "#f4f7fa",
};

export class Screen {
  #encoder = new TextEncoder();
  #fit = new FitAddon();
  #unparsed = 0;
  #unparsedHistory = 0;
  #answers = true;

  /** `on` has input(bytes), resize({rows, cols}) and title(text). */
  constructor(element, on) {
    this.terminal = new Terminal({
      theme: THEME,
      fontFamily: getComputedStyle(document.documentElement).getPropertyValue("--mono"),
      fontSize: 14,
      lineHeight: 1.2,
      cursorBlink: !matchMedia("(prefers-reduced-motion: reduce)").matches,
      scrollback: 20_000,
      overviewRuler: { width: 10 }, // which is the scrollbar's width too
      macOptionIsMeta: true,
      minimumContrastRatio: 4.5,
    });
    this.terminal.loadAddon(this.#fit);
    this.terminal.open(element);
    this.terminal.onData((text) => this.#isUnasked() || on.input(this.#encoder.encode(text)));
    this.terminal.onBinary((text) => this.#isUnasked() || on.input(Uint8Array.from(text, (c) => c.charCodeAt(0))));
    this.terminal.onResize(on.resize);
    this.terminal.onTitleChange(on.title);
    // Tab and Escape belong to the program: without this key the keyboard could not leave the terminal.
    this.terminal.attachCustomKeyEventHandler((event) => event.key !== "F6");
    new ResizeObserver(() => this.fit()).observe(element);
    this.fit();
  }

  /** The size in cells. */
  get size() {
    return { rows: this.terminal.rows, cols: this.terminal.cols };
  }

  /** Fill the element. */
  fit() {
    const proposed = this.#fit.proposeDimensions();
    if (proposed?.cols > 1 && proposed.rows > 1) this.#fit.fit();
  }

  /** Start anew, empty; resolves then. xterm parses later than it is written to: what waits there goes first. */
  clear() {
    this.terminal.options.disableStdin = false;
    return new Promise((resolve) => this.terminal.write(ANEW, resolve));
  }

  /** Show it, take no more keys. */
  freeze() {
    this.terminal.options.disableStdin = true;
    this.terminal.write("\x1b[?25l");
  }

  /**
   * Draw these bytes. Queries in `history` (where is the cursor? what are you?) were answered when they were asked:
   * what xterm answers to them now is not sent. Returns a promise where the caller had better wait.
   */
  write(bytes, history) {
    this.#unparsed += bytes.length;
    this.#unparsedHistory += history;
    const drawn = new Promise((resolve) => {
      this.terminal.write(bytes, () => {
        this.#unparsed -= bytes.length;
        this.#unparsedHistory -= history;
        resolve();
      });
    });
    return this.#unparsed > MAX_UNPARSED ? drawn : undefined;
  }

  /** Write a remark of the page's own, dimmed and on a line of its own. */
  remark(text) {
    this.terminal.write(`\r\n\x1b[0;2m${text}\x1b[0m\r\n`);
  }

  /** Whether xterm answers programs' questions here: one tab of a session is enough. */
  set answers(yes) {
    this.#answers = yes;
  }

  /** Whether xterm speaks for itself, and must not. Keys and pastes come while an event is being dispatched. */
  #isUnasked() {
    return window.event === undefined && (this.#unparsedHistory > 0 || !this.#answers);
  }
}
