// Small helpers: elements without innerHTML, and formatted numbers.

export const $ = (selector, root = document) => root.querySelector(selector);

/**
 * h("button", { type: "button", onclick }, "text", child): `on…` are listeners, `style` holds CSS properties; `null`
 * children are left out.
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, part] of Object.entries(value)) element.style.setProperty(key, part);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const nats = (value, digits = 3) =>
  (Object.is(Math.round(value * 1e6), -0) ? 0 : value).toFixed(digits).replace("-", "−");

export function percent(share) {
  if (share === null) return "–";
  const value = 100 * share;
  if (value > 0 && value < 0.1) return "<\u202f0.1\u00a0%";
  if (value > 99.9 && value < 100) return ">\u202f99.9\u00a0%";
  return `${value.toFixed(value > 99 || value < 10 ? 1 : 0)}\u00a0%`.replace(".0\u00a0", "\u00a0");
}

/** Returns a token's text with its spaces and line breaks made visible. */
export const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "(empty)";

/** Stores a value, if the browser allows it. `storage`: "localStorage" or "sessionStorage". */
export function remember(storage, name, value) {
  try {
    window[storage].setItem(name, value);
  } catch {
    // Blocked by the user: the value is lost when the page is left.
  }
}

export function recall(storage, name) {
  try {
    return window[storage].getItem(name);
  } catch {
    return null;
  }
}

export function save(blob, name) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
