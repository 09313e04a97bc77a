// One conversation at work: the model's turn, stop, undo, try again, edit.

import { editStory, joinStory, spaceOut } from "./conversations.js";
import { announce, onNextFrame, showToast } from "./dom.js";
import { generate, Meter } from "./generation.js";
import { Trace } from "./trace.js";

const MIN_PROMPT = 16; // tokens that stay of a story that is cut to the context
const SENTENCE_END = /[.!?\u2026]["'\u201d\u2019)]*\s|\n/g;

export class Session {
  // `onChange` draws everything around the text, `onProgress(stats)` what changes with each token.
  constructor({ conversations, transcript, controls, apiKey, onChange, onProgress }) {
    Object.assign(this, { conversations, transcript, controls, apiKey, onChange, onProgress });
    this.draw = onNextFrame(() => this.drawNow());
    this.failure = null;
    this.abort = null; // of the answer that is running
  }

  get isRunning() {
    return this.abort !== null;
  }

  get messages() {
    return this.conversation.messages;
  }

  get isStory() {
    return this.conversation.mode === "story";
  }

  // Whether there is something for the model to answer, or to continue.
  get canGoOn() {
    return this.isStory ? this.messages.length > 0 : this.messages.at(-1)?.role === "user";
  }

  open(conversation) {
    this.stop();
    this.conversation = conversation;
    this.failure = null;
    this.transcript.show(conversation);
    this.onChange();
  }

  setModel(model) {
    this.model = model;
  }

  // Adds the user's words, if any, and lets the model go on.
  send(text) {
    if (this.isRunning || !(text.trim() || this.canGoOn)) return;
    if (text.trim()) {
      const words = this.isStory ? spaceOut(joinStory(this.messages), text) : text.trim();
      this.messages.push({ role: "user", text: words });
      this.transcript.append(this.messages.at(-1));
      this.save();
    }
    this.run();
  }

  async run() {
    const { conversation, model } = this;
    const messages = [...this.messages];
    const message = { role: "assistant", text: "" };
    const { numExperts, nLayers } = model;
    const meter = new Meter(numExperts && this.controls.expertsPerToken);
    if (numExperts) message.trace = new Trace(nLayers, numExperts, this.controls.expertsPerToken);
    this.begin(message, meter);
    const { signal } = this.abort;
    const request = {
      conversation: { ...conversation, messages },
      model,
      params: this.buildParams(),
    };
    try {
      for await (const update of generate({ ...request, key: this.apiKey.value, signal })) {
        this.take(update);
      }
    } catch (error) {
      if (error.name === "AbortError") meter.note({ text: "", pieces: [], finishReason: "abort" });
      else this.failure = error;
    }
    this.end(conversation, message, meter);
  }

  begin(message, meter) {
    this.failure = null;
    this.abort = new AbortController();
    Object.assign(this, { message, meter, numAnnounced: 0 });
    this.messages.push(message);
    this.transcript.append(message);
    this.transcript.setStreaming(true);
    this.transcript.scrollToEnd();
    this.onChange();
  }

  take(update) {
    this.message.text += update.text;
    for (const piece of update.pieces) this.message.trace?.push(piece);
    this.meter.note(update);
    this.draw();
  }

  drawNow() {
    if (!this.isRunning) return; // the last drawing was done by `end`
    this.drawProgress();
    this.announceSentences();
  }

  drawProgress() {
    this.transcript.update();
    this.onProgress(this.meter.stats);
  }

  end(conversation, message, meter) {
    this.drawProgress();
    this.abort = null;
    message.stats = meter.stats;
    const isEmpty = !message.text;
    if (isEmpty) conversation.messages.splice(conversation.messages.indexOf(message), 1);
    if (this.conversations.find(conversation.id)) this.save(conversation); // else it was deleted
    if (conversation !== this.conversation) return this.onChange(); // another one was opened
    if (isEmpty) this.transcript.show(conversation);
    if (isEmpty && meter.finishReason === "stop") showToast("The model had nothing to add.");
    this.transcript.setStreaming(false);
    announce(`${message.text.slice(this.numAnnounced)} ${meter.stats.tokens} tokens.`);
    this.onChange();
  }

  // Sentences are told to a screen reader when they are whole.
  announceSentences() {
    const { text } = this.message;
    SENTENCE_END.lastIndex = this.numAnnounced;
    let end = this.numAnnounced;
    while (SENTENCE_END.test(text)) end = SENTENCE_END.lastIndex;
    if (end === this.numAnnounced) return;
    announce(text.slice(this.numAnnounced, end));
    this.numAnnounced = end;
  }

  // Says whether there was an answer to stop.
  stop() {
    this.abort?.abort();
    return this.isRunning;
  }

  // Takes back the last answer, and returns the words of the user before it.
  undo() {
    if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    const words = this.messages.at(-1)?.role === "user" ? this.messages.pop().text : "";
    this.refresh();
    return this.isStory ? words.trimStart() : words;
  }

  again() {
    if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    this.transcript.show(this.conversation);
    this.run();
  }

  // After an answer that broke off: a story goes on from there, a conversation is answered anew.
  retry() {
    return this.isStory ? this.run() : this.again();
  }

  replaceText(text) {
    if (text === joinStory(this.messages)) return;
    this.conversation.messages = editStory(this.messages, text);
    this.refresh();
  }

  // From now on only the end of a story that fits is sent.
  cutToContext() {
    this.conversation.isCut = true;
    this.run();
  }

  buildParams() {
    const { params } = this.controls;
    if (!this.conversation.isCut || !this.isStory) return params;
    const room = this.model.contextLength - params.max_tokens;
    return { ...params, truncate_prompt_tokens: Math.max(room, MIN_PROMPT) };
  }

  refresh() {
    this.failure = null;
    this.transcript.show(this.conversation);
    if (this.messages.length) this.save();
    else this.conversations.remove(this.conversation.id);
    this.onChange();
  }

  save(conversation = this.conversation) {
    const notice = this.conversations.save(conversation);
    if (notice) showToast(notice);
  }
}
