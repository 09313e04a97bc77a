// The conversation on the page: a story as one flowing text, a chat as one message below another.

import { byId, make } from "./dom.js";
import { Markdown } from "./markdown.js";
import { paintToken } from "./painter.js";
import { PlainText } from "./plain_text.js";

const NEAR_END = 80; // pixels from the end within which a growing answer is followed

export class Transcript {
  constructor() {
    this.root = byId("transcript");
    this.scroller = byId("scroller");
    this.entries = []; // one per message: { message, element, drawing }
    this.follows = true;
    this.scroller.addEventListener("scroll", () => this.noteScroll(), { passive: true });
    byId("to-end").addEventListener("click", () => this.scrollToEnd());
  }

  // Draws a conversation anew.
  show({ mode, messages }) {
    this.mode = mode;
    this.entries = [];
    this.parent = mode === "story" ? make("article", { class: "story" }) : this.root;
    this.root.replaceChildren(...(mode === "story" ? [this.parent] : []));
    for (const message of messages) this.append(message);
    this.scrollToEnd();
  }

  append(message) {
    const isChat = this.mode === "chat";
    const body = make(isChat ? "div" : "span", { class: "body" });
    const name = make("h2", { class: "unseen" }, message.role === "user" ? "You" : "Answer");
    const attributes = { class: `message ${message.role}`, "data-entry": this.entries.length };
    const element = make(isChat ? "article" : "span", attributes, ...(isChat ? [name] : []), body);
    const usesMarkdown = isChat && message.role === "assistant";
    const drawing = usesMarkdown ? new Markdown(body) : new PlainText(body);
    this.entries.push({ message, element, drawing });
    this.parent.append(element);
    drawing.update(message);
  }

  // Draws what is new in the last message.
  update() {
    const last = this.entries.at(-1);
    last?.drawing.update(last.message);
    if (this.follows) this.scrollToEnd();
  }

  setStreaming(isStreaming) {
    this.root.setAttribute("aria-busy", isStreaming);
    for (const { element } of this.entries) element.classList.remove("streaming");
    this.entries.at(-1)?.element.classList.toggle("streaming", isStreaming);
  }

  // { trace, token, text } of a token's span.
  findToken(span) {
    const { trace, text } = this.entries[span.closest("[data-entry]").dataset.entry].message;
    const token = Number(span.dataset.token);
    return (
      trace && { trace, token, text: text.slice(trace.ends[token - 1] ?? 0, trace.ends[token]) }
    );
  }

  // Colours all tokens again, after the layer or the lit cell changed.
  repaint() {
    for (const { message, element } of this.entries) {
      if (!message.trace) continue;
      for (const span of element.querySelectorAll(".token")) paintToken(span, message.trace);
    }
  }

  scrollToEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.noteScroll();
  }

  noteScroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.follows = scrollHeight - scrollTop - clientHeight < NEAR_END;
    byId("to-end").hidden = this.follows;
  }
}
