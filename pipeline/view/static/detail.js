// Dialog with all data of one row, by artifact.

import { byId, make, picture, short } from "./dom.js";
import { ask, imageOf, set, state } from "./state.js";

export async function openDetail(row) {
  set({ open: `${row.shard}:${row.row}` });
  const dialog = byId("detail");
  const reply = await ask("row", { a: state.a, shard: row.shard, row: row.row });
  const parts = Object.entries(reply.parts).map(([name, values]) => part(name, values));
  const close = make("button", { type: "button", class: "close", click: () => dialog.close() }, "Close");
  const title = make("h2", {}, `${row.shard} / ${Object.values(reply.parts)[0].key}`);
  dialog.replaceChildren(close, title, picture(imageOf(row, "full"), row.key ?? "", true), ...parts);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

export function watchDetail() {
  byId("detail").addEventListener("close", () => set({ open: "" }));
}

function part(name, values) {
  const section = make("section", {}, make("h3", {}, name));
  const plain = make("dl", { class: "plain-values" });
  for (const [key, value] of Object.entries(values)) {
    if (value === null || value === "" || (Array.isArray(value) && !value.length)) continue;
    if (key === "captions" && Array.isArray(value)) section.append(captions(value));
    else if (key === "questions" && Array.isArray(value)) section.append(questions(value));
    else if (key === "open_questions" && Array.isArray(value)) section.append(inWords(value, values.open_answers ?? []));
    else if (key === "open_answers" && values.open_questions?.length) continue;
    else plain.append(make("dt", {}, key), make("dd", {}, shown(value)));
  }
  section.append(plain);
  return section;
}

function captions(list) {
  const made = make("dl", { class: "said" });
  for (const each of list) {
    const facts = [each.model, each.finish_reason, each.n_tokens === null || each.n_tokens === undefined ? null : `${each.n_tokens} tokens`, rightOf(each)];
    made.append(make("dt", {}, [each.name, ...facts.filter(Boolean)].join(" · "), each.status && each.status !== "ok" ? make("span", { class: "warn" }, ` ${each.status}`) : null));
    made.append(make("dd", {}, each.text ?? "–"));
  }
  return made;
}

function rightOf(caption) {
  const answers = caption.answers ?? [];
  const scored = answers.reduce((sum, each) => sum + (each.scored ?? 0), 0);
  return scored ? `${answers.reduce((sum, each) => sum + (each.right ?? 0), 0)} of ${scored} answers right` : null;
}

function questions(list) {
  const made = make("ol", { class: "asked" });
  for (const each of list) {
    if (!each.question) continue;
    const options = make("span", { class: "options" });
    (each.options ?? []).forEach((option, index) => options.append(make("span", index === each.answer ? { class: "right-option", title: "the right one" } : {}, option), " "));
    made.append(make("li", {}, each.question, each.status && each.status !== "ok" ? make("span", { class: "warn" }, ` ${each.status}`) : null, make("br"), options));
  }
  return made;
}

// Open-ended questions with what is accepted, and the answers in words from each caption.
function inWords(asked, answers) {
  const made = make("ol", { class: "asked" });
  for (const each of asked) {
    const accepted = make("span", { class: "options" });
    for (const answer of each.answers ?? []) accepted.append(make("span", { class: "right-option", title: "accepted" }, answer), " ");
    const said = answers.filter((answer) => answer.id === each.id).map((answer) => `${answer.name}: ${answer.answer ?? "–"}`);
    made.append(make("li", {}, each.question, make("br"), accepted, ...said.flatMap((text) => [make("br"), text])));
  }
  return made;
}

function shown(value) {
  if (typeof value === "number") return short(value);
  return typeof value === "string" ? value : JSON.stringify(value);
}
