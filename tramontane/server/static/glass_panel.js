// The glass box: which experts wrote the answer. Switches, heat map, legend, dial's note.

import { byId } from "./dom.js";
import { HeatMap } from "./heat_map.js";
import { view } from "./painter.js";
import { addCounts } from "./trace.js";

const KEY = "tramontane.glass";

export class GlassPanel {
  constructor(transcript, storage) {
    this.transcript = transcript;
    this.storage = storage;
    this.messages = [];
    this.map = new HeatMap(byId("heat"), { onView: () => this.onView() });
    this.switches = { color: byId("color-tokens"), number: byId("number-tokens") };
    const stored = readStored(storage);
    this.switches.color.checked = stored.color !== false;
    this.switches.number.checked = stored.number === true;
    for (const input of Object.values(this.switches)) {
      input.addEventListener("change", () => this.onSwitch());
    }
    for (const input of document.querySelectorAll("[name=scope]")) {
      input.addEventListener("change", () => this.update());
    }
  }

  setModel(model) {
    this.model = model;
    this.hasExperts = model.numExperts > 0;
    byId("glass").hidden = !this.hasExperts;
    if (!this.hasExperts) return this.applySwitches();
    view.layer = Math.floor(model.nLayers / 2);
    view.lit = null;
    this.map.build(model);
    byId("dial-note").textContent =
      `The model's own is ${model.expertsPerToken} of ${model.numExperts}.`;
    if (model.numExperts > 16) this.switches.number.checked = true; // colours repeat: numbers tell
    this.applySwitches();
    this.describeView();
  }

  // The messages whose tokens are counted.
  show(messages) {
    this.messages = messages;
    this.update();
  }

  update() {
    if (!this.hasExperts) return;
    const { length } = this.map.counts;
    const traces = this.messages
      .map(({ trace }) => trace)
      .filter((t) => t?.counts.length === length);
    const isAll = document.querySelector("[name=scope]:checked").value === "all";
    const counted = isAll ? traces : traces.slice(-1);
    const peak = this.map.update(counted.length ? addCounts(counted) : new Uint32Array(length));
    byId("legend-high").textContent = `${Math.round(100 * peak)}%`;
    this.describeView();
  }

  onSwitch() {
    const stored = { color: this.switches.color.checked, number: this.switches.number.checked };
    this.storage?.setItem(KEY, JSON.stringify(stored));
    this.applySwitches();
  }

  applySwitches() {
    const { classList } = document.documentElement;
    classList.toggle("glass", this.hasExperts && this.switches.color.checked);
    classList.toggle("numbers", this.hasExperts && this.switches.number.checked);
  }

  onView() {
    document.documentElement.classList.toggle("lighting", view.lit !== null);
    this.transcript.repaint();
    this.describeView();
  }

  describeView() {
    const even = (100 / this.model.numExperts).toFixed(1);
    byId("glass-note").textContent =
      `Tokens are coloured by their first expert at layer ${view.layer}. Click a row for another.`;
    byId("cell-note").textContent = view.lit
      ? this.map.describe(view.lit)
      : `Numbers: % of a layer's choices; even is ${even}.`;
  }
}

function readStored(storage) {
  try {
    return JSON.parse(storage?.getItem(KEY) ?? "{}") ?? {};
  } catch {
    return {}; // not what this page wrote
  }
}
