// Conversations, kept in this browser alone (localStorage), within bounds: when they are too many
// the oldest go, first what is known of their experts, then all. Newest first.
//
// A conversation is { id, title, mode: "story" | "chat", updated, messages }, a message
// { role: "user" | "assistant", text, trace?, stats? }. A story is its messages' texts in a row.

import { Trace } from "./trace.js";

const PREFIX = "tramontane.conversation.";
const MAX_CONVERSATIONS = 200;
const MAX_CHARACTERS = 3_000_000; // browsers give about five million to all of a site
const MAX_TITLE = 60;

export class Conversations {
  constructor(storage) {
    this.storage = storage; // null: nothing is kept beyond this page
    this.sizes = new Map(); // characters in storage, by id
    this.items = storage ? readAll(storage, this.sizes) : [];
  }

  find(id) {
    return this.items.find((conversation) => conversation.id === id);
  }

  create(mode) {
    return { id: makeId(), title: "", mode, updated: Date.now(), messages: [] };
  }

  // Puts it first and writes it down; says in words what had to go for it, or nothing.
  save(conversation) {
    conversation.updated = Date.now();
    conversation.title ||= makeTitle(conversation);
    return this.restore(conversation);
  }

  // Puts it back in its place by age, as after a removal that was a mistake.
  restore(conversation) {
    const others = this.items.filter(({ id }) => id !== conversation.id);
    this.items = [conversation, ...others].sort((a, b) => b.updated - a.updated);
    return this.storage ? this.write(conversation) : "";
  }

  remove(id) {
    this.items = this.items.filter((conversation) => conversation.id !== id);
    this.sizes.delete(id);
    this.storage?.removeItem(PREFIX + id);
  }

  // Room is made in this order: the experts of the oldest, this one's own, the oldest altogether.
  write(conversation) {
    let notice = "";
    for (const old of this.items.slice(MAX_CONVERSATIONS)) this.remove(old.id);
    while (!this.put(conversation)) {
      notice =
        "This browser's space is full: the oldest conversations lost their experts, or went.";
      const others = this.items.filter((item) => item !== conversation);
      const fat = others.findLast(({ messages }) => messages.some(({ trace }) => trace));
      if (fat) this.slim(fat);
      else if (this.put(withoutTraces(conversation))) break;
      else if (others.length) this.remove(others.at(-1).id);
      else return "This conversation is too large to be kept.";
    }
    return notice;
  }

  slim(conversation) {
    conversation.messages = withoutTraces(conversation).messages;
    if (!this.put(conversation)) this.remove(conversation.id);
  }

  // False where it does not fit our bound, or the browser's.
  put(conversation) {
    const text = JSON.stringify(conversation);
    let size = text.length;
    for (const [id, length] of this.sizes) if (id !== conversation.id) size += length;
    if (size > MAX_CHARACTERS) return false;
    try {
      this.storage.setItem(PREFIX + conversation.id, text);
    } catch {
      return false; // the browser's own limit is lower than ours: the caller makes room
    }
    this.sizes.set(conversation.id, text.length);
    return true;
  }
}

// What Export writes: the conversations as they are kept.
export function exportJson(conversations) {
  return JSON.stringify({ format: "tramontane conversations, version 1", conversations }, null, 2);
}

// Everything that the user and the model wrote, in a row.
export function joinStory(messages) {
  return messages.map(({ text }) => text).join("");
}

// A story after it was edited as a whole: messages that the edit left alone at the start stay, with
// what is known of their experts; the rest is the user's.
export function editStory(messages, text) {
  let end = 0;
  const kept = messages.findIndex((message) => {
    const isSame = text.startsWith(message.text, end);
    if (isSame) end += message.text.length;
    return !isSame;
  });
  const same = kept < 0 ? messages : messages.slice(0, kept);
  return end < text.length ? [...same, { role: "user", text: text.slice(end) }] : same;
}

// Words that the user adds to a story: with a space before them if they would run into the last.
export function spaceOut(before, text) {
  const needsSpace = /\S$/.test(before) && /^[\p{L}\p{N}"'(]/u.test(text);
  return needsSpace ? ` ${text}` : text;
}

function makeTitle({ messages }) {
  const words = (messages[0]?.text ?? "").trim().replace(/\s+/g, " ");
  const characters = [...words];
  return characters.length > MAX_TITLE ? `${characters.slice(0, MAX_TITLE).join("")}\u2026` : words;
}

function makeId() {
  const bytes = crypto.getRandomValues(new Uint8Array(8)); // randomUUID exists on https alone
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function withoutTraces(conversation) {
  const messages = conversation.messages.map(({ trace, ...message }) => message);
  return { ...conversation, messages };
}

function readAll(storage, sizes) {
  const keys = Object.keys(storage).filter((key) => key.startsWith(PREFIX));
  const found = keys.map((key) => readOne(storage.getItem(key), key.slice(PREFIX.length), sizes));
  return found.filter(Boolean).sort((a, b) => b.updated - a.updated);
}

// Another version of this page, or a hand, may have left something else there: that is not shown.
function readOne(text, id, sizes) {
  try {
    const conversation = JSON.parse(text);
    const messages = conversation.messages.map(readMessage);
    sizes.set(id, text.length);
    const mode = conversation.mode === "chat" ? "chat" : "story";
    const updated = Number(conversation.updated) || 0;
    return { id, title: String(conversation.title), mode, updated, messages };
  } catch {
    return null;
  }
}

function readMessage({ role, text, trace, stats }) {
  const read = { role: role === "user" ? "user" : "assistant", text: String(text), stats };
  return trace ? { ...read, trace: Trace.fromJSON(trace) } : read;
}
