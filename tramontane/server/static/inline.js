// What stands within a line: `code`, **bold**, *italic*, [a link](https://...). Everything else is
// text. Only http and https become links; any other address stays text.

import { emitText } from "./painter.js";
import { make } from "./dom.js";

const LINK = /\[([^[\]]{1,300})\]\((https?:\/\/[^\s()<>]{1,1000})\)/y;
const WORD = /[\p{L}\p{N}]/u;
const MAX_DEPTH = 4;
const MAX_TRIES = 8; // to find the end of an emphasis, so that a line of stars is not slow

// Draws lines { start, end } of the source, one below the other.
export function emitInline(parent, source, lines) {
  lines.forEach((line, i) => {
    if (i) parent.append("\n");
    new InlineText(source, line).draw(parent, 0, line.end - line.start, 0);
  });
}

class InlineText {
  constructor(source, { start, end }) {
    this.source = source;
    this.offset = start; // of the line in the source; all else here counts within the line
    this.text = source.text.slice(start, end);
  }

  draw(parent, start, end, depth) {
    let plain = start; // text from here on is not drawn yet
    for (let i = start; i < end;) {
      const found = depth < MAX_DEPTH && this.findElement(i, end);
      if (!found) {
        i += 1;
        continue;
      }
      this.emit(parent, plain, i);
      if (found.isCode) this.emit(found.element, found.from, found.to);
      else this.draw(found.element, found.from, found.to, depth + 1);
      parent.append(found.element);
      i = plain = found.end;
    }
    this.emit(parent, plain, end);
  }

  emit(parent, start, end) {
    if (start < end) emitText(parent, this.source, this.offset + start, this.offset + end);
  }

  // What begins at character i: its element, the stretch `from` - `to` within, and the `end`.
  findElement(i, end) {
    const character = this.text[i];
    if (character === "`") return this.findCode(i, end);
    if (character === "[") return this.findLink(i, end);
    if (character !== "*" && character !== "_") return null;
    const double = character + character;
    return (
      this.findEmphasis(i, end, double, "strong") ?? this.findEmphasis(i, end, character, "em")
    );
  }

  findCode(i, end) {
    const [ticks] = /^`+/.exec(this.text.slice(i, i + 32));
    const from = i + ticks.length;
    const to = this.find(ticks, from, end);
    return to < 0
      ? null
      : { element: make("code"), from, to, end: to + ticks.length, isCode: true };
  }

  findEmphasis(i, end, mark, tag) {
    const from = i + mark.length;
    if (!this.text.startsWith(mark, i) || from >= end || /\s/.test(this.text[from])) return null;
    if (mark[0] === "_" && WORD.test(this.text[i - 1] ?? "")) return null; // snake_case
    const to = this.findEmphasisEnd(mark, from + 1, end);
    if (to < 0 || /\s/.test(this.text[to - 1])) return null;
    const after = to + mark.length;
    if (mark[0] === "_" && WORD.test(this.text[after] ?? "")) return null;
    return { element: make(tag), from, to, end: after };
  }

  // Three stars end an italic within a bold; two do not end an italic.
  findEmphasisEnd(mark, from, end) {
    let at = from;
    for (let tries = 0; tries < MAX_TRIES; tries++) {
      const to = this.find(mark, at, end);
      let after = to + mark.length;
      while (to >= 0 && after < end && this.text[after] === mark[0]) after += 1;
      if (to < 0 || after - to === mark.length) return to;
      if (mark.length === 2) return after - 2;
      at = after;
    }
    return -1;
  }

  findLink(i, end) {
    LINK.lastIndex = i;
    const match = LINK.exec(this.text);
    if (!match || LINK.lastIndex > end || !URL.canParse(match[2])) return null;
    const [, { length }, href] = match;
    const rel = "noopener noreferrer nofollow";
    const element = make("a", { href, title: href, target: "_blank", rel });
    return { element, from: i + 1, to: i + 1 + length, end: LINK.lastIndex };
  }

  find(mark, from, end) {
    const found = this.text.indexOf(mark, from);
    return found + mark.length <= end ? found : -1;
  }
}
