// Builds DOM nodes. Text goes in as text: nothing on this page parses markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

// make("button", { class: "quiet", on: { click } }, "Send"): attributes, listeners, children.
export function make(tag, { on = {}, ...attributes } = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (/^(on|style)/.test(name)) throw new Error(`attribute ${name} is not allowed here`);
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  for (const [event, listener] of Object.entries(on)) node.addEventListener(event, listener);
  node.append(...children);
  return node;
}

// One of the symbols at the end of index.html.
export function makeIcon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function makeButton(label, { icon, onClick, ...attributes }) {
  const content = icon ? makeIcon(icon) : label;
  const title = icon ? { title: label, "aria-label": label } : {};
  return make(
    "button",
    { type: "button", ...title, ...attributes, on: { click: onClick } },
    content,
  );
}

// A short message at the foot of the page, with one thing to do about it, for some seconds.
export function showToast(text, { action, onAction, seconds = 7 } = {}) {
  const close = () => toast.remove();
  const toast = make("div", { class: "toast", role: "status" }, make("span", {}, text));
  if (action) {
    const act = () => {
      close();
      onAction();
    };
    toast.append(makeButton(action, { onClick: act, class: "link" }));
  }
  byId("toasts").replaceChildren(toast);
  setTimeout(close, seconds * 1000);
}

// Tells a screen reader; the same text twice is told twice.
export function announce(text) {
  byId("announcer").replaceChildren(make("span", {}, text));
}

// `draw` runs once before the next paint, however often the function is called. A hidden tab
// paints nothing, so what must not wait calls `draw` itself.
export function onNextFrame(draw) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  };
}
