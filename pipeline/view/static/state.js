// What is shown, kept in the address; and how the server is asked.

const DEFAULTS = { a: "", tab: "rows", filter: "", search: "", shard: "", row: "", open: "", column: "", value: "", side: ">=", left: "", right: "", differ: "" };

export const state = { ...DEFAULTS };

export function readAddress() {
  const asked = new URLSearchParams(location.search);
  for (const name of Object.keys(DEFAULTS)) state[name] = asked.get(name) ?? DEFAULTS[name];
}

/** Change what is shown. ``step``: a new entry in the browser's history, else the present one is replaced. */
export function set(changes, step = false) {
  Object.assign(state, changes);
  const told = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) if (value !== DEFAULTS[name]) told.set(name, value);
  const address = told.size ? `?${told}` : location.pathname;
  if (`${location.search || location.pathname}` === address) return;
  history[step ? "pushState" : "replaceState"](null, "", address);
}

const pending = new Map();

/** Ask the server. A newer question of the same kind calls an older one off (AbortError). */
export async function ask(path, parameters = {}, kind = path) {
  pending.get(kind)?.abort();
  const control = new AbortController();
  pending.set(kind, control);
  let response;
  try {
    response = await fetch(address(path, parameters), { signal: control.signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is `capipe view` still running?");
  }
  const told = response.headers.get("content-type")?.startsWith("application/json") ? await response.json() : { error: await response.text() };
  if (!response.ok) throw Object.assign(new Error(told.error ?? `error ${response.status}`), { status: response.status });
  return told;
}

export function address(path, parameters = {}) {
  const told = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (Array.isArray(value)) value.forEach((each) => told.append(name, each));
    else if (value !== "" && value !== null && value !== undefined) told.set(name, value);
  }
  return `/api/${path}?${told}`;
}

/** The rows that are asked about: the artifact, filter and search of the moment. */
export const query = () => ({ a: state.a, filter: fullFilter(), search: state.search });

function fullFilter() {
  const differ = state.tab === "compare" && state.differ && state.left && state.right ? `${state.left} != ${state.right}` : "";
  if (!differ) return state.filter;
  return state.filter ? `(${state.filter}) and ${differ}` : differ;
}

export const imageOf = (row, size = "small") => address("image", { a: state.a, shard: row.shard, row: row.row, size }) + (row.uid ? `&u=${encodeURIComponent(row.uid)}` : "");
