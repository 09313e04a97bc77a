// Turns a stretch of an answer into text nodes, or into one span per token where its experts are
// known. Where the text is emitted is the business of plain_text.js and markdown.js.

const NUM_COLORS = 16; // text.css has so many; beyond them colours repeat and numbers tell

// What is shown of the experts: the layer that colours the tokens, and a cell of the heat map whose
// tokens are lit.
export const view = { layer: 0, lit: null };

// The text from `start` to `end` into `parent`.
export function emitText(parent, { text, trace }, start, end) {
  if (!trace) return void parent.append(text.slice(start, end));
  let from = start;
  for (let token = trace.findToken(start); from < end && token < trace.length; token++) {
    const to = Math.min(end, trace.ends[token]);
    if (to > from) emitToken(parent, trace, token, text.slice(from, to));
    from = Math.max(from, to);
  }
  if (from < end) parent.append(text.slice(from, end));
}

// White space before a word stays outside the colour: words keep apart, and lines end cleanly.
function emitToken(parent, trace, token, text) {
  const word = text.trimStart() || text;
  if (word.length < text.length) parent.append(text.slice(0, text.length - word.length));
  const span = document.createElement("span");
  span.dataset.token = token;
  span.textContent = word;
  paintToken(span, trace);
  parent.append(span);
}

// Colour, number and light of a token's span, for the view as it is.
export function paintToken(span, trace) {
  const token = Number(span.dataset.token);
  const expert = trace.firstExpert(token, view.layer);
  const isLit = view.lit && trace.uses(token, view.lit.layer, view.lit.expert);
  span.className = `token ${nameColor(expert)}${isLit ? " lit" : ""}`;
  span.dataset.expert = expert < 0 ? "" : expert;
}

export function nameColor(expert) {
  return expert < 0 ? "not-run" : `x${expert % NUM_COLORS}`;
}
