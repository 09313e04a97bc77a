// What stands where nothing was written yet: a word of welcome, and beginnings to try. Each is of
// another domain, so that other experts answer.

import { byId, make, makeButton } from "./dom.js";

const STORY = {
  title: "Begin a text. The model goes on.",
  text: "Watch which experts write each word; change what you like, and go on from there.",
  openings: [
    ["A story", "Once upon a time there was a little fox who"],
    ["Python", "def count_words(text):\n    "],
    ["French", "Il \u00e9tait une fois un roi qui"],
    ["Arithmetic", "Solve 3*x + 4 = 19 for x.\n"],
    ["Medicine", "BACKGROUND: The aim of this study was to"],
    ["Physics", "\\begin{abstract}\nWe study the"],
  ],
};
const CHAT = {
  title: "What shall we talk about?",
  text: "Watch which experts write each word of the answer.",
  openings: [
    ["Explain", "Explain to a child how a mixture of experts works."],
    ["Story", "Tell me a short story about a little fox and the north wind."],
    ["Python", "Write a Python function that counts the words of a text."],
    ["French", "Raconte-moi une histoire de marins en trois phrases."],
  ],
};

export function greet({ isStory, isHidden, onPick }) {
  byId("welcome").hidden = isHidden;
  const { title, text, openings } = isStory ? STORY : CHAT;
  byId("welcome-title").textContent = title;
  byId("welcome-text").textContent = text;
  const items = openings.map(([name, opening]) => {
    const label = make("span", { class: "muted" }, name);
    const button = makeButton("", { onClick: () => onPick(opening) });
    button.append(label, make("span", {}, opening.trim()));
    return make("li", {}, button);
  });
  byId("openings").replaceChildren(...items);
}
