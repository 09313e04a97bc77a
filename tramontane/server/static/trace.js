// Which experts each token of an answer ran through, at every layer, with their weights.
// L layers, E experts, K experts per token. A token of few bytes may complete no character.

const NO_EXPERT = 255; // the token did not run (an answer's last does not), or through fewer than K

export class Trace {
  // All layers' counts of tokens per expert, [layer * E + expert].
  constructor(nLayers, numExperts, expertsPerToken) {
    this.nLayers = nLayers;
    this.numExperts = numExperts;
    this.expertsPerToken = expertsPerToken;
    this.counts = new Uint32Array(nLayers * numExperts);
    this.ids = [];
    this.ends = []; // character after each token in the answer's text
    this.experts = []; // bytes, L * K per token
    this.weights = []; // bytes, 255 = 1
  }

  get length() {
    return this.ids.length;
  }

  get textLength() {
    return this.ends.at(-1) ?? 0;
  }

  // A piece as the server sends it: { text, token_id, experts, weights }, the last two K per
  // layer, or null.
  push({ text, token_id, experts, weights }) {
    this.ids.push(token_id);
    this.ends.push(this.textLength + text.length);
    for (let layer = 0; layer < this.nLayers; layer++) {
      for (let k = 0; k < this.expertsPerToken; k++) {
        const expert = experts?.[layer]?.[k] ?? -1;
        const isKnown = expert >= 0 && expert < this.numExperts;
        this.experts.push(isKnown ? expert : NO_EXPERT);
        this.weights.push(isKnown ? Math.round(255 * (weights?.[layer]?.[k] ?? 0)) : 0);
        if (isKnown) this.counts[layer * this.numExperts + expert] += 1;
      }
    }
  }

  // [{ expert, weight }] of a token at a layer, the router's first choice first; empty if the token
  // did not run, or if its model (another than the present one) has no such layer.
  at(token, layer) {
    if (layer >= this.nLayers) return [];
    const start = (token * this.nLayers + layer) * this.expertsPerToken;
    const chosen = [];
    for (let i = start; i < start + this.expertsPerToken; i++) {
      if (this.experts[i] === NO_EXPERT) continue;
      chosen.push({ expert: this.experts[i], weight: this.weights[i] / 255 });
    }
    return chosen;
  }

  firstExpert(token, layer) {
    return this.at(token, layer)[0]?.expert ?? -1;
  }

  uses(token, layer, expert) {
    return this.at(token, layer).some((choice) => choice.expert === expert);
  }

  // The first token that ends after this character.
  findToken(offset) {
    let [low, high] = [0, this.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.ends[middle] > offset) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  toJSON() {
    const { nLayers, numExperts, expertsPerToken, ids, ends } = this;
    const [experts, weights] = [encodeBytes(this.experts), encodeBytes(this.weights)];
    return { nLayers, numExperts, expertsPerToken, ids, ends, experts, weights };
  }

  static fromJSON({ nLayers, numExperts, expertsPerToken, ids, ends, experts, weights }) {
    const trace = new Trace(nLayers, numExperts, expertsPerToken);
    Object.assign(trace, { ids, ends });
    trace.experts = decodeBytes(experts);
    trace.weights = decodeBytes(weights);
    const perToken = nLayers * expertsPerToken;
    trace.experts.forEach((expert, i) => {
      const layer = Math.floor((i % perToken) / expertsPerToken);
      if (expert !== NO_EXPERT) trace.counts[layer * numExperts + expert] += 1;
    });
    return trace;
  }
}

// Counts of several traces of one model, added.
export function addCounts(traces) {
  const sum = new Uint32Array(traces[0]?.counts.length ?? 0);
  for (const { counts } of traces) {
    if (counts.length === sum.length) counts.forEach((count, i) => (sum[i] += count));
  }
  return sum;
}

function encodeBytes(bytes) {
  let binary = "";
  for (const byte of bytes) binary += String.fromCharCode(byte);
  return btoa(binary);
}

function decodeBytes(text) {
  return Array.from(atob(text), (character) => character.charCodeAt(0));
}
