// Two captions of the same image side by side, with their differing words marked.

import { make } from "./dom.js";
import { frame, showRows } from "./rows.js";
import { set, state } from "./state.js";

const LONGEST = 800; // longest text to align, in pieces; longer texts are compared as bags of words
const PIECES = /(\s+|[.,;:!?"“”()]+)/; // separators of words

export async function showCompare(facts, body, back) {
  const names = facts.columns.filter((each) => each.prose && each.name !== "questions_text");
  if (names.length < 2) {
    body.replaceChildren(make("p", {}, "Only one column of captions is known of these images: caption them with a second model, or another prompt, into the same folder."));
    return;
  }
  const written = names.filter((each) => each.name.startsWith("caption_"));
  const preferred = written.length > 1 ? written : names;
  const known = (name) => names.some((each) => each.name === name);
  if (!known(state.left)) set({ left: preferred[0].name });
  if (!known(state.right)) set({ right: preferred.find((each) => each.name !== state.left).name });
  const holder = make("div");
  await showRows(facts, holder, card, [...new Set([state.left, state.right])], back);
  body.replaceChildren(pick(names), holder);
}

function pick(names) {
  const choice = (side, title) => {
    const select = make("select", { id: `pick-${side}`, "aria-label": title });
    for (const each of names) select.append(make("option", { value: each.name, selected: each.name === state[side] }, `${each.name} (${each.artifact})`));
    select.addEventListener("change", () => again({ [side]: select.value }));
    return make("label", {}, `${title} `, select);
  };
  const differ = make("input", { type: "checkbox", id: "differ", checked: Boolean(state.differ) });
  differ.addEventListener("change", () => again({ differ: differ.checked ? "1" : "" }));
  return make("p", { class: "tools" }, choice("left", "Left"), choice("right", "Right"), make("label", {}, differ, " only where they differ"));
}

function again(changes) {
  set({ ...changes, shard: "", row: "" }, true);
  document.dispatchEvent(new CustomEvent("changed"));
}

function card(row) {
  const texts = [row.values[state.left], row.values[state.right]];
  const [left, right] = marked(...texts.map((text) => (text ?? "").split(PIECES)));
  const side = (name, words, text) => make("section", {}, make("h3", {}, `${name} · ${text ? text.trim().split(/\s+/).length : 0} words`), make("p", {}, ...(text === null || text === undefined ? ["–"] : words)));
  return frame(row, make("div", { class: "sides" }, side(state.left, left, texts[0]), side(state.right, right, texts[1])));
}

/** Words of both texts, marked unless they are in the common subsequence. */
function marked(one, other) {
  const common = one.length > LONGEST || other.length > LONGEST ? bags(one, other) : aligned(one, other);
  const show = (words, kept) => words.map((word, index) => (kept.has(index) || !word.trim() ? word : make("mark", {}, word)));
  return [show(one, common[0]), show(other, common[1])];
}

function bags(one, other) {
  const keep = (words, others) => new Set(words.flatMap((word, index) => (others.has(word) ? [index] : [])));
  return [keep(one, new Set(other)), keep(other, new Set(one))];
}

/** Longest common subsequence, as sets of indices. */
function aligned(one, other) {
  const rows = one.length + 1;
  const columns = other.length + 1;
  const lengths = new Uint16Array(rows * columns);
  for (let i = one.length - 1; i >= 0; i--) {
    for (let j = other.length - 1; j >= 0; j--) {
      lengths[i * columns + j] = one[i] === other[j] ? lengths[(i + 1) * columns + j + 1] + 1 : Math.max(lengths[(i + 1) * columns + j], lengths[i * columns + j + 1]);
    }
  }
  const kept = [new Set(), new Set()];
  for (let i = 0, j = 0; i < one.length && j < other.length; ) {
    if (one[i] === other[j]) {
      kept[0].add(i++);
      kept[1].add(j++);
    } else if (lengths[(i + 1) * columns + j] >= lengths[i * columns + j + 1]) i++;
    else j++;
  }
  return kept;
}
