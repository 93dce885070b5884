// Rows page by page, with their images.

import { byId, make, number, picture, short } from "./dom.js";
import { ask, imageOf, query, set, state } from "./state.js";
import { openDetail } from "./detail.js";

const LIMIT = 24;
let before = null;
let after = null;

/** Show the page that starts at the row in the URL. ``back``: the page that ends before it. */
export async function showRows(facts, body, card = rowCard, columns = undefined, back = false) {
  let page;
  let rows = [];
  let start = state.shard ? { shard: state.shard, row: state.row || 0 } : {};
  for (;;) {
    page = await ask("rows", { ...query(), ...start, limit: LIMIT - rows.length, back, columns });
    rows = back ? [...page.rows, ...rows] : [...rows, ...page.rows];
    if (!page.stopped) break;
    const next = back ? page.before : page.after;
    start = { shard: next[0], row: next[1] };
    byId("count").textContent = `looking through shard ${next[0]} …`;
  }
  if (back) {
    const first = rows[0];
    set(first && page.before ? { shard: first.shard, row: String(first.row) } : { shard: "", row: "" }, true);
    if (!page.before) return showRows(facts, body, card, columns);
  }
  before = state.shard ? [state.shard, state.row || 0] : null;
  after = back ? (page.after ?? null) : page.after;
  const list = make("div", { class: "rows", role: "list" }, ...rows.map((row) => card(row, page.columns)));
  if (!rows.length) list.append(make("p", {}, page.total ? "No row is like that." : "No shard is committed yet."));
  body.replaceChildren(tools(facts), list, pager());
  byId("faults").textContent = page.faults.join(" ");
}

function tools(facts) {
  const names = facts.shards.map((each) => make("option", { value: each.name }, `${number(each.rows)} rows`));
  const field = make("input", { type: "text", list: "shards", value: state.shard, placeholder: facts.shards[0]?.name ?? "", "aria-label": "Go to shard" });
  field.addEventListener("change", () => jump({ shard: field.value, row: "" }));
  return make("p", { class: "tools" }, make("label", {}, "Shard ", field), make("datalist", { id: "shards" }, ...names));
}

function pager() {
  const link = (text, on, to) => make("button", { type: "button", disabled: !on, click: to }, text);
  return make("nav", { class: "pager", "aria-label": "Pages" }, link("← Previous", before, previousPage), link("Next →", after, nextPage));
}

function jump(to, back = false) {
  set(to, true);
  document.dispatchEvent(new CustomEvent("changed", { detail: { back, moved: true } }));
}

export const nextPage = () => after && jump({ shard: after[0], row: String(after[1]) });
export const previousPage = () => before && jump({}, true);

function rowCard(row, columns) {
  const texts = make("dl", { class: "said" });
  const figures = make("p", { class: "figures" });
  for (const name of columns) {
    const value = row.values[name];
    if (value === null || value === undefined || value === "") continue;
    if (typeof value === "number") figures.append(make("span", {}, make("b", {}, short(value)), ` ${name}`));
    else texts.append(make("dt", {}, name), make("dd", {}, value));
  }
  return frame(row, texts, figures);
}

/** Card of a row, with ``inside`` as its content. */
export function frame(row, ...inside) {
  const open = () => openDetail(row).catch((error) => (byId("faults").textContent = error.message));
  const state_ = row.status === "ok" ? null : make("p", { class: "warn" }, `${row.status}${row.error ? `: ${row.error}` : ""}`);
  const button = make("button", { type: "button", class: "picture", click: open, "aria-label": `Open row ${row.key}` }, picture(imageOf(row), row.key));
  const where = make("p", { class: "where" }, `${row.shard} · ${row.key}`, row.duplicate ?? null);
  const card = make("article", { class: "card", role: "listitem", tabindex: "0" }, button, make("div", {}, where, state_, ...inside));
  card.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target === card) open();
  });
  return card;
}

/** Move to the next (1) or previous (-1) card. */
export function move(step) {
  const cards = [...document.querySelectorAll(".card")];
  const at = cards.indexOf(document.activeElement?.closest?.(".card"));
  const next = cards[at < 0 ? (step > 0 ? 0 : cards.length - 1) : at + step];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}
