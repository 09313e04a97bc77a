// The heat map: a row per layer, a column per expert, each cell as strong as its share of the
// layer's choices. A click on a row chooses the layer that colours the tokens; a cell under the
// pointer lights the tokens that used it. Arrow keys do both.

import { announce, make } from "./dom.js";
import { nameColor, view } from "./painter.js";

const MAX_COLUMNS_WITH_TEXT = 16;
const MAX_HIGH_ROWS = 12; // more layers than this get low rows

export class HeatMap {
  // `onView` is called when the layer or the lit cell has changed.
  constructor(table, { onView }) {
    this.table = table;
    this.onView = onView;
    table.addEventListener("click", (event) => this.onClick(event));
    const whenHovering = (light) => (event) => event.pointerType === "touch" || light(event);
    table.addEventListener(
      "pointerover",
      whenHovering(({ target }) => this.lightAt(target)),
    );
    table.addEventListener(
      "pointerleave",
      whenHovering(() => this.light(null)),
    );
    table.addEventListener("blur", () => this.light(null));
    table.addEventListener("keydown", (event) => this.move(event));
  }

  // Builds the table of a model; its counts are zero.
  build({ nLayers, numExperts }) {
    Object.assign(this, { nLayers, numExperts });
    const hasText = numExperts <= MAX_COLUMNS_WITH_TEXT;
    this.table.classList.toggle("dense", nLayers > MAX_HIGH_ROWS);
    this.table.classList.toggle("wordless", !hasText);
    const experts = Array.from({ length: numExperts }, (_, expert) => expert);
    const chip = (expert) =>
      make(
        "th",
        { scope: "col" },
        make("span", { class: `chip ${nameColor(expert)}` }, `${expert}`),
      );
    const head = make("tr", {}, make("th", { scope: "col", class: "corner" }, "layer"));
    head.append(...experts.map(chip));
    this.rows = Array.from({ length: nLayers }, (_, layer) => this.makeRow(layer, experts));
    this.table.replaceChildren(make("thead", {}, head), make("tbody", {}, ...this.rows));
    this.markLayer();
    this.update(new Uint32Array(nLayers * numExperts));
  }

  makeRow(layer, experts) {
    const cell = (expert) => make("td", { "data-expert": expert, class: nameColor(expert) });
    const header = make("th", { scope: "row" }, `${layer}`);
    return make("tr", { "data-layer": layer }, header, ...experts.map(cell));
  }

  // Counts [layer * E + expert] into the cells. Returns the largest share.
  update(counts) {
    this.counts = counts;
    const shares = this.rows.map((_, layer) => this.readShares(layer));
    const peak = Math.max(...shares.flat(), 2 / this.numExperts); // so that an even load looks even
    this.rows.forEach((row, layer) => {
      shares[layer].forEach((share, expert) => this.fill(row.cells[expert + 1], share, peak));
    });
    return peak;
  }

  readShares(layer) {
    const row = this.counts.subarray(layer * this.numExperts, (layer + 1) * this.numExperts);
    const total = row.reduce((sum, count) => sum + count, 0);
    return Array.from(row, (count) => (total ? count / total : 0));
  }

  fill(cell, share, peak) {
    const text = share ? `${Math.round(100 * share)}` : "";
    if (cell.textContent !== text) cell.textContent = text;
    cell.style.setProperty("--strength", `${Math.round((100 * share) / peak)}%`);
    cell.classList.toggle("half", share > 0.6 * peak); // the dark theme's text changes here,
    cell.classList.toggle("strong", share > 0.8 * peak); // the light theme's here
  }

  // "layer 3, expert 2: 14 of 60 choices, 23%"
  describe({ layer, expert }) {
    const share = this.readShares(layer)[expert];
    const count = this.counts[layer * this.numExperts + expert];
    return `layer ${layer}, expert ${expert}: ${count} tokens, ${(100 * share).toFixed(1)}%`;
  }

  // A finger cannot hover: a tap lights the cell too, and the next tap there puts it out.
  onClick({ target, pointerType }) {
    const row = target.closest("tr[data-layer]");
    if (row) this.chooseLayer(Number(row.dataset.layer));
    if (pointerType !== "touch") return;
    if (target.closest("td.lit")) this.light(null);
    else this.lightAt(target);
  }

  chooseLayer(layer) {
    view.layer = Math.min(Math.max(layer, 0), this.nLayers - 1);
    this.markLayer();
    this.onView();
  }

  markLayer() {
    this.rows.forEach((row, layer) => row.classList.toggle("chosen", layer === view.layer));
  }

  lightAt(target) {
    const expert = target.closest("td")?.dataset.expert;
    const layer = target.closest("tr")?.dataset.layer;
    this.light(expert === undefined ? null : { layer: Number(layer), expert: Number(expert) });
  }

  light(cell) {
    if (!cell && !view.lit) return;
    this.table.querySelector("td.lit")?.classList.remove("lit");
    view.lit = cell;
    if (cell) this.rows[cell.layer].cells[cell.expert + 1].classList.add("lit");
    this.onView();
  }

  move(event) {
    const down = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const right = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape" && view.lit) this.light(null);
    else if (down) this.chooseLayer(view.layer + down);
    else if (!right) return;
    event.preventDefault();
    event.stopPropagation(); // Esc here does not stop an answer
    if (right) this.moveAlong(right);
    else if (down && view.lit) this.light({ ...view.lit, layer: view.layer });
    announce(view.lit ? this.describe(view.lit) : `layer ${view.layer}`);
  }

  moveAlong(step) {
    const expert = view.lit ? view.lit.expert + step : 0;
    const within = Math.min(Math.max(expert, 0), this.numExperts - 1);
    this.light({ layer: view.layer, expert: within });
  }
}
