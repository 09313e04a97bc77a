// A small Markdown, drawn as DOM nodes: paragraphs, headings, lists, quotes, fenced code, rules;
// inline.js has what stands within a line. A block that nothing can change any more is drawn once;
// the rest is drawn anew on each update, so a stream ends as the same nodes as the whole text.
//
// A block is a list of lines { start, end }: stretches of the source, their indentation cut off.

import { emitInline } from "./inline.js";
import { make } from "./dom.js";
import { emitText } from "./painter.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[^`]*$/;
const HEADING = /^(#{1,6})[ \t]+/;
const RULE = /^ {0,3}([-*_])([ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+)/;
const INDENT = /^[ \t]+/;
const MAX_DEPTH = 8; // of lists and quotes within each other

export class Markdown {
  constructor(root) {
    this.root = root;
    this.numFinal = 0; // children of root that stay
    this.finalEnd = 0; // character of the source after them
  }

  // Draws the source { text, trace }; the text begins with what was drawn before.
  update(source) {
    const blocks = splitBlocks(source.text, splitLines(source.text, this.finalEnd));
    while (this.root.childNodes.length > this.numFinal) this.root.lastChild.remove();
    const numFinal = countFinal(source.text, blocks);
    blocks.forEach((block, i) => {
      this.root.append(drawBlock(source, block, 0));
      if (i < numFinal) {
        this.numFinal += 1;
        this.finalEnd = block.end;
      }
    });
  }
}

// A block is final when the one after it has a whole line: until then that line may turn out to
// belong to it ("-" becomes "- item").
function countFinal(text, blocks) {
  const isFinal = (block, i) =>
    i + 1 < blocks.length && text.indexOf("\n", blocks[i + 1].start) >= 0;
  const first = blocks.findIndex((block, i) => !isFinal(block, i));
  return Math.max(first, 0);
}

function splitLines(text, from) {
  const lines = [];
  for (let start = from; start < text.length;) {
    const newline = text.indexOf("\n", start);
    const end = newline < 0 ? text.length : newline;
    lines.push({ start, end });
    start = end + 1;
  }
  return lines;
}

// [{ kind, lines, start, end }] where `end` is the first character of what follows.
function splitBlocks(text, lines) {
  const blocks = [];
  for (let i = 0; i < lines.length;) {
    const read = (line) => text.slice(line.start, line.end);
    if (!read(lines[i]).trim()) {
      i += 1;
      continue;
    }
    const kind = findKind(read(lines[i]));
    const next = findEnd[kind](lines, i, read);
    const end = next < lines.length ? lines[next].start : text.length;
    blocks.push({ kind, lines: lines.slice(i, next), start: lines[i].start, end });
    i = next;
  }
  return blocks;
}

function findKind(line) {
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  return ITEM.test(line) ? "list" : "paragraph";
}

// Where the block ends that begins at line i.
const findEnd = {
  heading: (lines, i) => i + 1,
  rule: (lines, i) => i + 1,
  quote: (lines, i, read) => findLine(lines, i + 1, (line) => !QUOTE.test(read(line))),
  paragraph: (lines, i, read) =>
    findLine(lines, i + 1, (line) => !read(line).trim() || findKind(read(line)) !== "paragraph"),
  code: (lines, i, read) => {
    const fence = FENCE.exec(read(lines[i]))[1];
    const close = findLine(lines, i + 1, (line) => isClosing(read(line), fence));
    return Math.min(close + 1, lines.length);
  },
  list: (lines, i, read) => {
    const isOrdered = isOrderedItem(read(lines[i]));
    const belongs = (line) => {
      const text = read(line);
      if (!text.trim() || INDENT.test(text)) return true;
      return findKind(text) === "list" && isOrderedItem(text) === isOrdered;
    };
    return findLine(lines, i + 1, (line) => !belongs(line));
  },
};

function findLine(lines, from, test) {
  let i = from;
  while (i < lines.length && !test(lines[i])) i += 1;
  return i;
}

const isOrderedItem = (line) => /\d/.test(ITEM.exec(line)[2]);
const isClosing = (line, fence) =>
  line.trimStart().startsWith(fence) && !line.trim().replaceAll(fence[0], "");

function drawBlock(source, block, depth) {
  return drawers[block.kind](source, block.lines, depth);
}

function drawBlocks(parent, source, lines, depth) {
  if (depth > MAX_DEPTH) return void parent.append(drawers.paragraph(source, lines));
  for (const block of splitBlocks(source.text, lines)) {
    parent.append(drawBlock(source, block, depth));
  }
}

const drawers = {
  rule: () => make("hr"),
  paragraph(source, lines) {
    const paragraph = make("p");
    emitInline(paragraph, source, lines);
    return paragraph;
  },
  heading(source, [line]) {
    const [mark, { length }] = HEADING.exec(source.text.slice(line.start, line.end));
    const heading = make(`h${Math.min(length + 2, 6)}`); // the page has its own h1 and h2
    emitInline(heading, source, [{ start: line.start + mark.length, end: line.end }]);
    return heading;
  },
  quote(source, lines, depth) {
    const quote = make("blockquote");
    drawBlocks(
      quote,
      source,
      lines.map((line) => cut(source, line, QUOTE)),
      depth + 1,
    );
    return quote;
  },
  code(source, [opening, ...lines]) {
    const fence = FENCE.exec(source.text.slice(opening.start, opening.end))[1];
    const last = lines.at(-1);
    if (last && isClosing(source.text.slice(last.start, last.end), fence)) lines.pop();
    const code = make("code");
    lines.forEach((line, i) => {
      if (i) code.append("\n");
      emitText(code, source, line.start, line.end);
    });
    return make("pre", { tabindex: 0 }, code);
  },
  list(source, lines, depth) {
    const first = ITEM.exec(source.text.slice(lines[0].start, lines[0].end))[2];
    const isOrdered = /\d/.test(first);
    const list = make(isOrdered ? "ol" : "ul", isOrdered ? { start: parseInt(first, 10) } : {});
    for (const item of splitItems(source, lines)) {
      const element = make("li");
      drawBlocks(element, source, item, depth + 1);
      list.append(element);
    }
    return list;
  },
};

// The lines of each item, its mark and their indentation cut off.
function splitItems(source, lines) {
  const read = (line) => source.text.slice(line.start, line.end);
  const measure = (line) => INDENT.exec(read(line))?.[0].length ?? 0;
  const indent = measure(lines[0]);
  const items = [];
  let rest = null; // what to cut off an item's later lines: as much as its mark takes
  for (const line of lines) {
    const mark = measure(line) <= indent && ITEM.exec(read(line))?.[0];
    if (mark) {
      items.push([cut(source, line, ITEM)]);
      rest = new RegExp(`^(\\t| {1,${Math.min(mark.length, 5)}})`);
    } else items.at(-1).push(cut(source, line, rest));
  }
  return items;
}

function cut(source, { start, end }, pattern) {
  const mark = pattern.exec(source.text.slice(start, end))?.[0] ?? "";
  return { start: start + mark.length, end };
}
