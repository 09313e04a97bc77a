// The sampling controls. What the user leaves alone is not sent: the model's own values hold.

import { byId, make } from "./dom.js";

const KEY = "tramontane.sampling";
const MAX_PILLS = 16; // more experts than this get a slider

const FIELDS = [
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.05,
    hint: "0 takes the likeliest token each time; more is bolder",
  },
  {
    name: "top_p",
    label: "Top p",
    min: 0.05,
    max: 1,
    step: 0.01,
    hint: "Only the likeliest tokens that make up this share; 1 is all",
  },
  {
    name: "top_k",
    label: "Top k",
    min: 0,
    max: 200,
    step: 1,
    hint: "Only so many of the likeliest tokens; 0 is all",
  },
  {
    name: "min_p",
    label: "Min p",
    min: 0,
    max: 0.5,
    step: 0.01,
    hint: "Only tokens at least this likely beside the likeliest; 0 is all",
  },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    min: 1,
    max: 2,
    step: 0.01,
    hint: "Above 1, tokens that were there already get less likely",
  },
  {
    name: "max_tokens",
    label: "Length",
    min: 16,
    max: 1024,
    step: 8,
    hint: "At most so many tokens in one answer",
  },
];
const FALLBACK = {
  temperature: 1,
  top_p: 1,
  top_k: 0,
  min_p: 0,
  repetition_penalty: 1,
  max_tokens: 200,
};

export class Controls {
  constructor(storage) {
    this.storage = storage;
    this.chosen = readChosen(storage);
    this.inputs = new Map();
    byId("fields").append(...FIELDS.map((field) => this.makeSlider(field)), this.makeSeed());
    byId("reset").addEventListener("click", () => this.reset());
  }

  // Shows a model's own values, and how many experts it has.
  setModel(model) {
    this.model = model;
    const length = this.inputs.get("max_tokens").input;
    if (model.contextLength) length.max = Math.min(model.contextLength, 4096);
    byId("dial").replaceChildren(...this.makeDial(model));
    this.refresh();
  }

  // What differs from the model's own.
  get params() {
    const { experts_per_token: experts, ...params } = this.chosen;
    params.max_tokens ??= this.readOwn("max_tokens"); // a server's own may be the whole context
    return this.expertsPerToken === this.model.expertsPerToken
      ? params
      : { ...params, experts_per_token: experts };
  }

  // More than this model has, from another model's time, counts as its own.
  get expertsPerToken() {
    const chosen = this.chosen.experts_per_token;
    return chosen <= this.model.numExperts ? chosen : this.model.expertsPerToken;
  }

  readOwn(name) {
    return this.model?.defaults[name] ?? FALLBACK[name];
  }

  set(name, value) {
    const isOwn =
      name === "experts_per_token"
        ? value === this.model.expertsPerToken
        : value === this.readOwn(name);
    if (value === null || isOwn) delete this.chosen[name];
    else this.chosen[name] = value;
    this.storage?.setItem(KEY, JSON.stringify(this.chosen));
    this.refresh();
  }

  reset() {
    this.chosen = {};
    this.storage?.removeItem(KEY);
    this.refresh();
  }

  refresh() {
    for (const [name, { input, output }] of this.inputs) {
      const value = this.chosen[name] ?? this.readOwn(name) ?? "";
      input.value = value;
      if (output) output.textContent = value;
      const share = (input.value - input.min) / (input.max - input.min);
      input.style.setProperty("--fill", `${100 * share}%`);
      input.closest(".field").classList.toggle("changed", name in this.chosen);
    }
    for (const pill of byId("dial").querySelectorAll("input")) {
      if (pill.type === "radio") pill.checked = Number(pill.value) === this.expertsPerToken;
      else pill.value = this.expertsPerToken;
    }
    byId("dial-value").textContent = this.model ? this.expertsPerToken : "";
    byId("reset").disabled = !Object.keys(this.chosen).length;
  }

  makeSlider({ name, label, min, max, step, hint }) {
    const output = make("output", { for: name });
    const onInput = () => this.set(name, Number(input.value));
    const input = make("input", {
      type: "range",
      id: name,
      min,
      max,
      step,
      on: { input: onInput },
    });
    this.inputs.set(name, { input, output });
    return make(
      "div",
      { class: "field", title: hint },
      make("label", { for: name }, label),
      output,
      input,
    );
  }

  makeSeed() {
    const onInput = () => this.set("seed", /^\d+$/.test(input.value) ? Number(input.value) : null);
    const input = make("input", {
      type: "text",
      id: "seed",
      inputmode: "numeric",
      maxlength: 15,
      pattern: "\\d*",
      placeholder: "new each time",
      autocomplete: "off",
      on: { change: onInput },
    });
    this.inputs.set("seed", { input });
    const title = "The same seed, text and settings give the same answer";
    return make(
      "div",
      { class: "field seed", title },
      make("label", { for: "seed" }, "Seed"),
      input,
    );
  }

  makeDial({ numExperts, expertsPerToken }) {
    const choose = ({ target }) => this.set("experts_per_token", Number(target.value));
    if (numExperts > MAX_PILLS) {
      const attributes = {
        type: "range",
        min: 1,
        max: numExperts,
        "aria-label": "Experts per token",
      };
      return [make("input", { ...attributes, on: { input: choose } })];
    }
    return Array.from({ length: numExperts }, (_, i) => {
      const isOwn = i + 1 === expertsPerToken;
      const input = make("input", {
        type: "radio",
        name: "experts",
        value: i + 1,
        on: { change: choose },
      });
      const own = isOwn ? [make("span", { class: "unseen" }, ", the model's own")] : [];
      return make(
        "label",
        { class: isOwn ? "pill own" : "pill" },
        input,
        make("span", {}, `${i + 1}`),
        ...own,
      );
    });
  }
}

function readChosen(storage) {
  try {
    const chosen = JSON.parse(storage?.getItem(KEY) ?? "{}");
    const names = [...FIELDS.map(({ name }) => name), "seed", "experts_per_token"];
    const numbers = names.filter((name) => Number.isFinite(chosen[name]));
    return Object.fromEntries(numbers.map((name) => [name, chosen[name]]));
  } catch {
    return {}; // not what this page wrote
  }
}
