// Helpers to create elements. Data is only ever inserted as text: no code here or elsewhere sets markup from data.

export const byId = (id) => document.getElementById(id);

/** Create an element with attributes (functions become listeners) and children (elements or texts). */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  assign(element, attributes);
  element.append(...children.filter((each) => each !== null && each !== undefined));
  return element;
}

/** The same for SVG. */
export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  assign(element, attributes);
  element.append(...children);
  return element;
}

function assign(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
}

export const number = (value) => new Intl.NumberFormat("en").format(value);

/** Format a number briefly: four significant digits, or an integer from 1000 on. */
export function short(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return number(value);
  return Math.abs(value) >= 1000 ? number(Math.round(value)) : String(+value.toPrecision(4));
}

/** Image of a row; a text if it cannot be loaded. */
export function picture(source, key, large = false) {
  const image = make("img", { src: source, alt: `Image ${key}`, decoding: "async" });
  image.addEventListener("error", () => image.replaceWith(make("span", { class: "none" }, "no image")));
  if (large) image.className = "large";
  return image;
}
