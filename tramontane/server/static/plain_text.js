// Text as it is, for stories and what the user wrote. It only ever grows, so what is drawn stays.

import { emitText } from "./painter.js";

export class PlainText {
  constructor(root) {
    this.root = root;
    this.length = 0;
  }

  // Draws the source { text, trace }; the text begins with what was drawn before.
  update(source) {
    emitText(this.root, source, this.length, source.text.length);
    this.length = source.text.length;
  }
}
