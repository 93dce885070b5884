// Interactive threshold on a score: number of rows kept, and the rows just above and below it.

import { byId, draw, make, number, short } from "./dom.js";
import { frame } from "./rows.js";
import { ask, query, set, state } from "./state.js";

const WIDTH = 900;
const HEIGHT = 220;
const STEPS = 1000;
let histogram = null;
let waiting = 0;

export async function showThreshold(facts, body) {
  const columns = facts.columns.filter((each) => each.kind === "number");
  if (!columns.length) {
    body.replaceChildren(make("p", {}, "No column of numbers is known of these images; `capipe filter` writes scores."));
    return;
  }
  if (!columns.some((each) => each.name === state.column)) {
    const liked = ["re_clip_score", "re_itm_score_min", "org_clip_score"].find((name) => columns.some((each) => each.name === name));
    set({ column: liked ?? columns.find((each) => each.name.includes("right_"))?.name ?? columns[0].name, value: "" });
  }
  histogram = await gathered(body);
  body.replaceChildren(...frameOf(columns));
  await settle();
}

/** Fetch the histogram; large artifacts take several requests. */
async function gathered(body) {
  for (;;) {
    const found = await ask("histogram", { ...query(), column: state.column });
    if (found.done) return found;
    body.replaceChildren(make("p", { role: "status" }, `${number(found.scanned)} of ${number(found.total)} rows looked at …`));
  }
}

const low = () => histogram.edges[0];
const high = () => histogram.edges[histogram.edges.length - 1];

function frameOf(columns) {
  if (state.value === "" || !Number.isFinite(Number(state.value))) set({ value: short(median()).replaceAll(",", "") });
  const select = make("select", { id: "column", "aria-label": "Score" }, ...columns.map((each) => make("option", { value: each.name, selected: each.name === state.column }, `${each.name} (${each.artifact})`)));
  select.addEventListener("change", () => {
    set({ column: select.value, value: "" }, true);
    document.dispatchEvent(new CustomEvent("changed"));
  });
  const side = make("select", { id: "side", "aria-label": "Keep what is" }, ...[">=", "<="].map((each) => make("option", { value: each, selected: each === state.side }, each === ">=" ? "at least" : "at most")));
  side.addEventListener("change", () => moved({ side: side.value }));
  const field = make("input", { id: "value", type: "number", step: "any", value: state.value, "aria-label": "Threshold" });
  field.addEventListener("input", () => field.value !== "" && moved({ value: field.value }));
  const slider = make("input", { id: "slider", type: "range", min: 0, max: STEPS, step: 1, value: place(), "aria-label": "Threshold" });
  slider.addEventListener("input", () => moved({ value: String(+(low() + (slider.value / STEPS) * (high() - low())).toPrecision(6)) }));
  const use = make("button", { type: "button", id: "use", click: useAsFilter }, "Show these rows");
  return [
    make("p", { class: "tools" }, select, side, field, use),
    make("p", { id: "stay", class: "stay", role: "status" }),
    make("div", { id: "picture" }, bars()),
    slider,
    make("p", { class: "soft", id: "keep" }),
    make("div", { class: "border" }, make("section", { id: "go" }), make("section", { id: "stays" })),
  ];
}

function median() {
  let left = histogram.values / 2;
  for (let index = 0; index < histogram.counts.length; index++) {
    left -= histogram.counts[index];
    if (left < 0) return histogram.edges[index];
  }
  return low();
}

const place = () => (high() > low() ? Math.round(((Number(state.value) - low()) / (high() - low())) * STEPS) : 0);

function moved(changes) {
  set(changes);
  byId("value").value = state.value;
  byId("slider").value = place();
  byId("picture").replaceChildren(bars());
  told(estimate(), histogram.values, "about ");
  clearTimeout(waiting);
  waiting = setTimeout(() => settle().catch(() => {}), 80);
}

/** Number of rows kept, estimated from the histogram while the slider moves. */
function estimate() {
  const at = Number(state.value);
  let kept = 0;
  histogram.counts.forEach((count, index) => {
    const [from, to] = [histogram.edges[index], histogram.edges[index + 1]];
    const share = Math.min(1, Math.max(0, (to - at) / (to - from)));
    kept += count * (state.side === ">=" ? share : 1 - share);
  });
  return Math.round(kept);
}

function told(kept, values, about = "") {
  const share = values ? ` (${((100 * kept) / values).toFixed(1)} %)` : "";
  byId("stay").replaceChildren(make("b", {}, `${about}${number(kept)}`), ` of ${number(values)} rows would stay${share}`, histogram.missing ? `; ${number(histogram.missing)} have no such score and would go` : "");
}

async function settle() {
  const found = await ask("threshold", { ...query(), column: state.column, value: state.value, at_least: state.side === ">=" });
  told(found.kept, found.values);
  byId("keep").textContent = `--keep "${found.keep}"`;
  side("go", "Just gone", found.go);
  side("stays", "Just kept", found.stay);
}

function side(id, title, rows) {
  const cards = rows.map((row) => {
    const texts = Object.values(row.values).filter((value) => typeof value === "string");
    return frame(row, make("p", { class: "figures" }, make("b", {}, short(row.value)), ` ${state.column}`), make("p", {}, texts[0] ?? ""));
  });
  byId(id).replaceChildren(make("h2", {}, title), ...(cards.length ? cards : [make("p", {}, "none")]));
}

function bars() {
  const most = Math.max(1, ...histogram.counts);
  const across = (value) => (high() > low() ? ((value - low()) / (high() - low())) * WIDTH : WIDTH / 2);
  const at = Number(state.value);
  const made = histogram.counts.map((count, index) => {
    const [from, to] = [histogram.edges[index], histogram.edges[index + 1]];
    const stays = state.side === ">=" ? to > at : from < at;
    const height = (count / most) * (HEIGHT - 30);
    return draw("rect", { class: stays ? "stays" : "goes", x: across(from), width: Math.max(0.5, across(to) - across(from) - 0.6), y: HEIGHT - 20 - height, height });
  });
  const x = Math.min(WIDTH, Math.max(0, across(at)));
  const ends = [low(), high()].map((value, index) => {
    const text = draw("text", { x: index ? WIDTH : 0, y: HEIGHT - 4, "text-anchor": index ? "end" : "start" });
    text.textContent = short(value);
    return text;
  });
  const label = `${histogram.column}: ${number(histogram.values)} values from ${short(low())} to ${short(high())}`;
  return draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label, class: "histogram" }, ...made, draw("line", { class: "at", x1: x, x2: x, y1: 0, y2: HEIGHT - 20 }), ...ends);
}

function useAsFilter() {
  const term = `${state.column} ${state.side} ${state.value}`;
  set({ filter: state.filter ? `(${state.filter}) and ${term}` : term, tab: "rows", shard: "", row: "" }, true);
  document.dispatchEvent(new CustomEvent("changed"));
}
