// Puts the page together: models, conversations, composer, keys.

import { fetchModels } from "./api.js";
import { Controls } from "./controls.js";
import { Conversations, joinStory } from "./conversations.js";
import { byId, make, makeButton, makeIcon, showToast } from "./dom.js";
import { describeStats } from "./generation.js";
import { GlassPanel } from "./glass_panel.js";
import { ApiKey, Drawers, openStorage, setUpTheme } from "./shell.js";
import { Session } from "./session.js";
import { Sidebar } from "./sidebar.js";
import { TokenCard } from "./token_card.js";
import { Transcript } from "./transcript.js";
import { greet } from "./welcome.js";

const RETRY_MS = 1500; // while the server loads its model
const STATS_MS = 200; // between two drawings of the statistics of a running answer

const storage = openStorage("localStorage");
const conversations = new Conversations(storage);
const transcript = new Transcript();
const card = new TokenCard(transcript);
const controls = new Controls(storage);
const glass = new GlassPanel(transcript, storage);
const drawers = new Drawers();
const apiKey = new ApiKey(openStorage("sessionStorage"), { onKey: connect });
const session = new Session({ conversations, transcript, controls, apiKey, onChange, onProgress });
const sidebar = new Sidebar(conversations, { onOpen: open, onRemove });
const [prompt, editor] = [byId("prompt"), byId("editor")];
let models = [];
let statsDrawnAt = 0;

async function connect() {
  try {
    models = await fetchModels(apiKey.value);
  } catch (error) {
    return onRefused(error);
  }
  session.failure = null;
  document.documentElement.classList.remove("starting");
  byId("model").replaceChildren(...models.map(({ id }) => make("option", { value: id }, id)));
  byId("model").hidden = models.length < 2;
  byId("model-name").hidden = models.length > 1;
  setModel(models[0]);
}

// A server that loads its model, or is not there yet, is asked again.
function onRefused(error) {
  const isStarting = error.status === 503 || error.status === 0;
  if (isStarting) setTimeout(connect, RETRY_MS);
  if (error.status === 401) apiKey.ask();
  session.failure = error;
  drawFailure(isStarting);
}

function setModel(model) {
  const { id, nLayers, numExperts, expertsPerToken, contextLength, hasChat } = model;
  session.setModel(model);
  controls.setModel(model);
  glass.setModel(model);
  byId("model-name").textContent = id;
  const experts = numExperts
    ? `${nLayers} layers \u00d7 ${numExperts} experts, ${expertsPerToken} per token`
    : "dense";
  const context = contextLength ? `context of ${contextLength.toLocaleString("en")} tokens` : "";
  byId("model-facts").textContent = experts;
  byId("model-context").textContent = context;
  byId("modes").hidden = !hasChat;
  byId("modes").querySelector(`[value=${hasChat ? "chat" : "story"}]`).checked = true;
  open(session.conversation ?? conversations.items[0] ?? null);
}

// Shows a conversation, or a new one.
function open(conversation) {
  const mode = document.querySelector("[name=mode]:checked").value;
  leaveEditor();
  card.hide();
  drawers.close();
  session.open(conversation ?? conversations.create(mode));
  prompt.value = "";
  resizePrompt();
  if (matchMedia("(hover: hover)").matches) prompt.focus(); // a phone would open its keyboard
}

function onRemove(id) {
  if (session.conversation?.id === id) open(null);
  else sidebar.draw(session.conversation?.id);
}

function onChange() {
  const { isRunning, isStory, messages, conversation } = session;
  document.documentElement.classList.toggle("running", isRunning);
  document.title = conversation.title ? `${conversation.title} - tramontane` : "tramontane";
  sidebar.draw(conversation.id);
  glass.show(messages);
  if (!isRunning) card.setTabStop();
  drawComposer({ isRunning, isStory, isEmpty: !messages.length });
  drawStats(messages.findLast(({ stats }) => stats)?.stats);
  drawFailure();
  greet({ isStory, isHidden: messages.length > 0 || isRunning, onPick });
}

function onProgress(stats) {
  glass.update();
  if (performance.now() - statsDrawnAt > STATS_MS) drawStats(stats);
}

function drawComposer({ isRunning, isStory, isEmpty }) {
  const label = isRunning ? "Stop" : isStory ? "Continue" : "Send";
  const keys = isRunning ? "Esc" : isStory ? "Ctrl+Enter" : "Enter";
  byId("send").replaceChildren(makeIcon(isRunning ? "stop" : isStory ? "wind" : "send"), label);
  byId("send").title = keys;
  setSendState();
  byId("undo").disabled = byId("again").disabled = byId("edit").disabled = isRunning || isEmpty;
  byId("copy").disabled = isEmpty;
  byId("edit").hidden = !isStory;
  prompt.placeholder = !isStory
    ? "Write to the model"
    : isEmpty
      ? "Write a beginning"
      : "Write on, or just continue";
}

function drawStats(stats) {
  statsDrawnAt = performance.now();
  const facts = stats ? describeStats(stats, session.model.contextLength) : [];
  const nodes = facts.map(([value, what]) => make("span", {}, make("b", {}, value), ` ${what}`));
  byId("stats").replaceChildren(...nodes);
}

function drawFailure(isRetrying = false) {
  const { failure } = session;
  byId("failure").hidden = !failure;
  if (!failure) return;
  const text = isRetrying ? `${failure.message} Trying again.` : failure.message;
  if (byId("failure-text").textContent !== text) byId("failure-text").textContent = text;
  const remedies = isRetrying ? [] : listRemedies(failure);
  const buttons = remedies.map(([label, onClick]) => makeButton(label, { onClick }));
  byId("failure-actions").replaceChildren(...buttons);
  transcript.scrollToEnd();
}

function listRemedies({ code, status }) {
  const remedies = [["Try again", () => (models.length ? session.retry() : connect())]];
  if (status === 401) remedies.unshift(["Give a key", () => apiKey.ask()]);
  if (code === "context_length_exceeded" && session.isStory) {
    remedies.unshift(["Go on from the end of the text", () => session.cutToContext()]);
  }
  return remedies;
}

function onPick(text) {
  prompt.value = text;
  send();
}

function send() {
  if (!models.length || session.isRunning) return;
  if (!editor.hidden) leaveEditor();
  const text = prompt.value;
  prompt.value = "";
  resizePrompt();
  if (!matchMedia("(hover: hover)").matches) prompt.blur(); // puts a phone's keyboard away
  session.send(text);
}

function undo() {
  const words = session.undo();
  if (!prompt.value) prompt.value = words;
  resizePrompt();
  prompt.focus();
}

function enterEditor() {
  editor.value = joinStory(session.messages);
  document.documentElement.classList.add("editing");
  editor.hidden = false;
  byId("edit").querySelector("span").textContent = "Done";
  editor.focus();
}

// What was edited holds; the model's own words that were left alone keep their experts.
function leaveEditor() {
  if (editor.hidden) return false;
  editor.hidden = true;
  document.documentElement.classList.remove("editing");
  byId("edit").querySelector("span").textContent = "Edit";
  session.replaceText(editor.value);
  return true;
}

async function copy() {
  const { isStory, messages } = session;
  const text = isStory ? joinStory(messages) : messages.map((m) => m.text.trim()).join("\n\n");
  try {
    await navigator.clipboard.writeText(text);
    showToast("Copied.", { seconds: 2 });
  } catch {
    showToast("This browser does not let the page copy."); // plain http on another machine
  }
}

function resizePrompt() {
  prompt.style.setProperty("height", "auto");
  prompt.style.setProperty("height", `${prompt.scrollHeight}px`);
  if (session.conversation) setSendState();
}

function setSendState() {
  const { isRunning, canGoOn } = session;
  byId("send").disabled = !isRunning && !canGoOn && !prompt.value.trim();
}

function onKey(event) {
  const isSend = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  const isPlainEnter = event.target === prompt && event.key === "Enter" && !event.shiftKey;
  const sendsPlainly = isPlainEnter && !session.isStory && matchMedia("(hover: hover)").matches;
  if (event.isComposing || byId("key-dialog").open) return;
  if (isSend || sendsPlainly) {
    event.preventDefault();
    send();
  } else if (event.key === "Escape") {
    return void (card.hide() || leaveEditor() || drawers.close() || session.stop());
  }
}

byId("new").addEventListener("click", () => open(null));
byId("modes").addEventListener("change", () => open(null));
byId("model").addEventListener("change", ({ target }) =>
  setModel(models.find(({ id }) => id === target.value)),
);
byId("send").addEventListener("click", () => (session.isRunning ? session.stop() : send()));
byId("undo").addEventListener("click", undo);
byId("again").addEventListener("click", () => leaveEditor() || session.again());
byId("edit").addEventListener("click", () => leaveEditor() || enterEditor());
byId("copy").addEventListener("click", copy);
prompt.addEventListener("input", resizePrompt);
addEventListener("keydown", onKey);
addEventListener("pagehide", () => session.isRunning && session.save()); // keeps half an answer
setUpTheme(storage);
connect();
