// What surrounds the conversation: drawers on narrow windows, light and dark, the API key.

import { byId } from "./dom.js";

const DRAWERS = { sidebar: "(max-width: 1180px)", panel: "(max-width: 860px)" };
const KEY = "tramontane.key";
const THEME = "tramontane.theme";

// Storage that the browser refuses (private windows, blocked sites) is null, never an error.
export function openStorage(name) {
  try {
    const storage = window[name];
    storage.getItem(KEY);
    return storage;
  } catch {
    return null;
  }
}

export class Drawers {
  constructor() {
    for (const [name, query] of Object.entries(DRAWERS)) {
      byId(`open-${name}`).addEventListener("click", () => this.toggle(name));
      const media = matchMedia(query);
      media.addEventListener("change", () => this.set(name, false));
      this.set(name, false);
    }
    byId("close-panel").addEventListener("click", () => this.close());
    byId("scrim").addEventListener("click", () => this.close());
  }

  isOpen(name) {
    return byId(name).classList.contains("open");
  }

  toggle(name) {
    const opens = !this.isOpen(name);
    this.close();
    this.set(name, opens);
    if (opens) byId(name).querySelector("button:not([hidden]), input, table").focus();
  }

  // Closes what is open; says whether anything was.
  close() {
    const open = Object.keys(DRAWERS).filter((name) => this.isOpen(name));
    for (const name of open) {
      const hadFocus = byId(name).contains(document.activeElement);
      this.set(name, false);
      if (hadFocus) byId(`open-${name}`).focus();
    }
    return open.length > 0;
  }

  // A closed drawer is out of the tab order; a wide window has no drawers.
  set(name, isOpen) {
    byId(name).classList.toggle("open", isOpen);
    byId(name).inert = !isOpen && matchMedia(DRAWERS[name]).matches;
    byId(`open-${name}`).setAttribute("aria-expanded", isOpen);
    byId("scrim").hidden = !this.isOpen("sidebar");
    document.documentElement.classList.toggle("panel-open", this.isOpen("panel"));
  }
}

// Switches between light and dark; the first click leaves the system's choice.
export function setUpTheme(storage) {
  byId("theme").addEventListener("click", () => {
    const { dataset } = document.documentElement;
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    dataset.theme = (dataset.theme ?? system) === "dark" ? "light" : "dark";
    storage?.setItem(THEME, dataset.theme);
  });
}

// The key lives in this tab's sessionStorage, and in no address.
export class ApiKey {
  // `onKey` is called after the user gave another key.
  constructor(storage, { onKey }) {
    this.storage = storage;
    this.value = storage?.getItem(KEY) ?? "";
    this.dialog = byId("key-dialog");
    byId("key").addEventListener("click", () => this.ask());
    byId("key-cancel").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener(
      "close",
      () => this.dialog.returnValue === "save" && this.save(onKey),
    );
  }

  ask() {
    byId("key-input").value = this.value;
    this.dialog.returnValue = "";
    if (!this.dialog.open) this.dialog.showModal();
    byId("key-input").select();
  }

  save(onKey) {
    this.value = byId("key-input").value.trim();
    byId("key-input").value = "";
    if (this.value) this.storage?.setItem(KEY, this.value);
    else this.storage?.removeItem(KEY);
    onKey();
  }
}
