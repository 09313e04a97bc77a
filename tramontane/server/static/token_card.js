// The card of a token: its text, its id, and at each layer its experts with their weights. The
// pointer or the focus shows it, a click or a tap keeps it, arrow keys go from token to token.

import { byId, make } from "./dom.js";
import { nameColor, view } from "./painter.js";

const MARGIN = 10; // pixels between token and card, and between card and the window's edge
const MAX_ROWS = 16; // more layers than this stand in two columns
const WHITE = { "\n": "\u21b5", "\t": "\u21e5", " ": "\u2423" }; // made visible

export class TokenCard {
  constructor(transcript) {
    this.transcript = transcript;
    this.card = byId("card");
    this.kept = false;
    this.current = null;
    const { root, scroller } = transcript;
    root.addEventListener("pointerover", (event) => this.onPointer(event));
    root.addEventListener("pointerleave", () => this.kept || this.hide());
    root.addEventListener("click", (event) => this.onClick(event));
    root.addEventListener("keydown", (event) => this.onKey(event));
    root.addEventListener("focusin", ({ target }) => target.matches(".token") && this.show(target));
    scroller.addEventListener("scroll", () => this.hide(), { passive: true });
    document.addEventListener("click", ({ target }) => {
      if (!target.closest(".token, #card")) this.hide();
    });
  }

  get isActive() {
    return document.documentElement.classList.contains("glass");
  }

  onPointer({ target, pointerType }) {
    if (pointerType === "touch" || this.kept) return;
    const span = target.closest(".token");
    if (span) this.show(span);
    else this.hide();
  }

  onClick({ target }) {
    const span = target.closest(".token");
    if (!span || !getSelection().isCollapsed) return; // a selection of text ends here, no click
    const keepsThis = !(this.kept && this.current === span);
    this.hide();
    if (keepsThis && this.show(span)) this.kept = true;
  }

  // The tokens of an answer are one stop of the tab key; the arrows go through them.
  onKey(event) {
    const span = event.target.closest(".token");
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!span || !step) return;
    event.preventDefault();
    const spans = [...this.transcript.root.querySelectorAll(".token")];
    const next = spans[spans.indexOf(span) + step];
    if (!next) return;
    moveTabStop(span, next);
    next.focus();
  }

  // Makes the last token of the conversation the stop of the tab key.
  setTabStop() {
    const { root } = this.transcript;
    moveTabStop(
      root.querySelector(".token[tabindex]"),
      [...root.querySelectorAll(".token")].at(-1),
    );
  }

  show(span) {
    const found = this.isActive && this.transcript.findToken(span);
    if (!found) return false;
    this.leaveCurrent();
    this.current = span;
    this.kept = false;
    span.classList.add("current");
    span.setAttribute("aria-describedby", "card");
    this.card.replaceChildren(makeHeader(found), makeRows(found));
    this.card.hidden = false;
    this.place(span);
    return true;
  }

  // Hides it; says whether there was one.
  hide() {
    if (this.card.hidden) return false;
    this.card.hidden = true;
    this.kept = false;
    this.leaveCurrent();
    return true;
  }

  leaveCurrent() {
    this.current?.classList.remove("current");
    this.current?.removeAttribute("aria-describedby");
    this.current = null;
  }

  // Below the token, or above where there is no room. A phone's style sheet pins it to the foot.
  place(span) {
    const token = span.getClientRects()[0];
    const { offsetWidth: width, offsetHeight: height } = this.card;
    const left = Math.min(token.left, innerWidth - width - MARGIN);
    const below = token.bottom + MARGIN;
    const fitsBelow = below + height + MARGIN < innerHeight;
    this.card.style.setProperty("left", `${Math.max(left, MARGIN)}px`);
    const top = fitsBelow ? below : Math.max(token.top - height - MARGIN, MARGIN);
    this.card.style.setProperty("top", `${top}px`);
  }
}

function moveTabStop(from, to) {
  from?.removeAttribute("tabindex");
  to?.setAttribute("tabindex", "0");
}

function makeHeader({ trace, token, text }) {
  const note = trace.at(token, 0).length
    ? `token ${token + 1}`
    : "the last token: no expert ran it";
  const seen = text.replace(/[\n\t]|^ | $/g, (white) => WHITE[white]);
  return make(
    "header",
    {},
    make("span", { class: "token-text" }, seen),
    make("span", { class: "muted" }, `id ${trace.ids[token]} \u00b7 ${note}`),
  );
}

function makeRows({ trace, token }) {
  const usesColumns = trace.nLayers > MAX_ROWS;
  const table = make("table", { class: usesColumns ? "two-columns" : "" });
  const body = make("tbody");
  const numRows = Math.ceil(trace.nLayers / 2);
  if (usesColumns) body.style.setProperty("grid-template-rows", `repeat(${numRows}, auto)`);
  for (let layer = 0; layer < trace.nLayers; layer++) {
    const choices = trace.at(token, layer);
    if (choices.length) body.append(makeRow(layer, choices));
  }
  table.append(body);
  return table;
}

function makeRow(layer, choices) {
  const bars = choices.map(({ expert, weight }) => {
    const bar = make("span", { class: `bar ${nameColor(expert)}` }, `${expert}`);
    bar.style.setProperty("flex-grow", weight.toFixed(3));
    return bar;
  });
  const weights = choices.map(({ weight }) => weight.toFixed(2)).join("  ");
  return make(
    "tr",
    { class: layer === view.layer ? "chosen" : "" },
    make("th", { scope: "row" }, `${layer}`),
    make("td", { class: "bars" }, make("div", {}, ...bars)),
    make("td", { class: "weights" }, weights),
  );
}
