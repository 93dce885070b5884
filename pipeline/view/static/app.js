// Frame of the viewer: list of artifacts, search and filter fields, tabs, keyboard shortcuts.

import { byId, make, number } from "./dom.js";
import { openDetail, watchDetail } from "./detail.js";
import { move, nextPage, previousPage, showRows } from "./rows.js";
import { showCompare } from "./compare.js";
import { showThreshold } from "./threshold.js";
import { ask, query, readAddress, set, state } from "./state.js";

const TABS = ["rows", "threshold", "compare"];
let catalog = { artifacts: [], damaged: {} };
let facts = null;

async function start() {
  readAddress();
  watchDetail();
  listen();
  await refresh();
  if (state.open) {
    const at = state.open.lastIndexOf(":");
    await openDetail({ shard: state.open.slice(0, at), row: Number(state.open.slice(at + 1)) }).catch(problem);
  }
}

/** Reload everything, including new commits. */
async function refresh() {
  try {
    catalog = await ask("catalog");
  } catch (error) {
    return problem(error);
  }
  if (!catalog.artifacts.some((each) => each.id === state.a)) set({ a: catalog.start });
  await show({ artifact: true });
}

async function show({ artifact = false, back = false } = {}) {
  byId("search").value = state.search;
  byId("filter").value = state.filter;
  for (const tab of TABS) byId(`tab-${tab}`).setAttribute("aria-selected", String(state.tab === tab));
  list();
  const body = byId("main");
  body.setAttribute("aria-busy", "true");
  try {
    if (artifact || !facts) {
      facts = await ask("columns", { a: state.a });
      byId("names").replaceChildren(...facts.columns.map((each) => make("option", { value: each.name }, each.artifact)));
      document.title = `${facts.name} · capipe view`;
    }
    byId("filter-error").textContent = "";
    byId("faults").textContent = "";
    const counted = count().catch(() => {});
    if (state.tab === "threshold") await showThreshold(facts, body);
    else if (state.tab === "compare") await showCompare(facts, body, back);
    else await showRows(facts, body, undefined, undefined, back);
    await counted;
  } catch (error) {
    problem(error);
  } finally {
    body.removeAttribute("aria-busy");
  }
}

/** Show the number of rows; large artifacts take several requests. */
async function count() {
  for (;;) {
    const found = await ask("count", query());
    const all = found.matched === found.total;
    byId("count").textContent = all ? `${number(found.total)} rows` : `${number(found.matched)} of ${number(found.total)} rows${found.done ? "" : `, ${number(found.scanned)} looked at …`}`;
    if (found.done) return;
  }
}

function problem(error) {
  if (error.name === "AbortError") return;
  const of = error.status === 400 && state.filter ? "filter-error" : "faults";
  byId(of).textContent = error.message;
}

function list() {
  byId("folder").textContent = catalog.folder ?? "capipe view";
  const entries = catalog.artifacts.map((each) => {
    const rows = Object.entries(each.rows).map(([status, amount]) => `${number(amount)} ${status}`).join(", ");
    const unfinished = each.shards_total !== null && each.shards < each.shards_total ? ` · ${each.shards} of ${each.shards_total} shards` : "";
    const button = make("button", { type: "button", "aria-current": each.id === state.a ? "true" : null, click: () => choose(each.id) }, make("b", {}, each.name), make("span", {}, `${each.stage}${unfinished}`), make("span", {}, rows || "no rows yet"));
    return make("li", {}, button);
  });
  byId("artifacts").replaceChildren(...entries);
  byId("damaged").textContent = Object.entries(catalog.damaged).map(([name, reason]) => `${name}: ${reason}`).join(" ");
}

function choose(id) {
  set({ a: id, shard: "", row: "", column: "", value: "", left: "", right: "", differ: "" }, true);
  show({ artifact: true });
}

function go(tab) {
  set({ tab, shard: "", row: "" }, true);
  show();
}

function listen() {
  for (const tab of TABS) byId(`tab-${tab}`).addEventListener("click", () => go(tab));
  for (const name of ["search", "filter"]) {
    let waiting = 0;
    byId(name).addEventListener("input", (event) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => {
        set({ [name]: event.target.value, shard: "", row: "" });
        show();
      }, 250);
    });
  }
  byId("refresh").addEventListener("click", refresh);
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  document.addEventListener("changed", (event) => {
    show(event.detail ?? {});
    if (event.detail?.moved) scrollTo({ top: 0 });
  });
  addEventListener("popstate", () => {
    const before = state.a;
    readAddress();
    show({ artifact: state.a !== before });
  });
  document.addEventListener("keydown", pressed);
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const field = event.target.closest?.("input, select, textarea");
  if (event.key === "Escape" && field) {
    event.preventDefault(); // else the browser clears a search field without an event
    return field.blur();
  }
  if (field || document.querySelector("dialog[open]")) return;
  const actions = {
    j: () => move(1),
    k: () => move(-1),
    ArrowDown: () => move(1),
    ArrowUp: () => move(-1),
    ArrowRight: nextPage,
    ArrowLeft: previousPage,
    "/": () => enter("search"),
    f: () => enter("filter"),
    r: refresh,
    1: () => go("rows"),
    2: () => go("threshold"),
    3: () => go("compare"),
    "?": () => byId("help").showModal(),
  };
  if (Object.hasOwn(actions, event.key)) {
    event.preventDefault();
    actions[event.key]();
  }
}

function enter(id) {
  byId(id).focus();
  byId(id).select();
}

start();
