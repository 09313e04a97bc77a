// The list of conversations: open, export, delete (with a way back).

import { exportJson } from "./conversations.js";
import { byId, make, makeButton, showToast } from "./dom.js";

export class Sidebar {
  // `onOpen(conversation)` shows one; `onRemove(id)` tells that one is gone.
  constructor(conversations, { onOpen, onRemove }) {
    Object.assign(this, { conversations, onOpen, onRemove });
    byId("export-all").addEventListener("click", () =>
      download(conversations.items, "conversations"),
    );
    byId("remove-all").addEventListener("click", () => this.remove(conversations.items));
  }

  draw(currentId) {
    const { items } = this.conversations;
    byId("conversations").replaceChildren(...items.map((item) => this.makeItem(item, currentId)));
    byId("no-conversations").hidden = items.length > 0;
    byId("export-all").disabled = byId("remove-all").disabled = !items.length;
  }

  makeItem(item, currentId) {
    const isCurrent = item.id === currentId;
    const title = item.title || "Untitled";
    const open = makeButton(title, {
      class: "title",
      onClick: () => this.onOpen(item),
      title,
      "aria-current": isCurrent ? "true" : null,
    });
    const save = makeButton("Export as JSON", {
      icon: "export",
      class: "small",
      onClick: () => download([item], title),
    });
    const remove = makeButton("Delete", {
      icon: "trash",
      class: "small",
      onClick: () => this.remove([item]),
    });
    return make("li", { class: isCurrent ? "current" : null }, open, save, remove);
  }

  remove(items) {
    const gone = [...items];
    gone.forEach(({ id }) => this.conversations.remove(id));
    gone.forEach(({ id }) => this.onRemove(id));
    const what =
      gone.length === 1 ? "Conversation deleted." : `${gone.length} conversations deleted.`;
    const onAction = () => {
      gone.forEach((item) => this.conversations.restore(item));
      this.onOpen(gone[0]);
    };
    showToast(what, { action: "Undo", onAction });
  }
}

function download(conversations, name) {
  const url = URL.createObjectURL(
    new Blob([exportJson(conversations)], { type: "application/json" }),
  );
  const file = name
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 50);
  make("a", { href: url, download: `tramontane-${file || "conversation"}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000); // the browser has begun to read it by then
}
