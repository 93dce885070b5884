// View state, kept in the URL; requests to the server.

const DEFAULTS = { a: "", tab: "rows", filter: "", search: "", shard: "", row: "", open: "", column: "", value: "", side: ">=", left: "", right: "", differ: "" };

export const state = { ...DEFAULTS };

export function readAddress() {
  const asked = new URLSearchParams(location.search);
  for (const name of Object.keys(DEFAULTS)) state[name] = asked.get(name) ?? DEFAULTS[name];
}

/** Change the state. ``step``: add an entry to the browser's history instead of replacing the current one. */
export function set(changes, step = false) {
  Object.assign(state, changes);
  const encoded = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) if (value !== DEFAULTS[name]) encoded.set(name, value);
  const address = encoded.size ? `?${encoded}` : location.pathname;
  if (`${location.search || location.pathname}` === address) return;
  history[step ? "pushState" : "replaceState"](null, "", address);
}

const pending = new Map();

/** Send a request. A newer request of the same kind aborts an older one (AbortError). */
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
  const reply = response.headers.get("content-type")?.startsWith("application/json") ? await response.json() : { error: await response.text() };
  if (!response.ok) throw Object.assign(new Error(reply.error ?? `error ${response.status}`), { status: response.status });
  return reply;
}

export function address(path, parameters = {}) {
  const encoded = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (Array.isArray(value)) value.forEach((item) => encoded.append(name, item));
    else if (value !== "" && value !== null && value !== undefined) encoded.set(name, value);
  }
  return `/api/${path}?${encoded}`;
}

/** Parameters of the current rows: artifact, filter and search. */
export const query = () => ({ a: state.a, filter: fullFilter(), search: state.search });

function fullFilter() {
  const differ = state.tab === "compare" && state.differ && state.left && state.right ? `${state.left} != ${state.right}` : "";
  if (!differ) return state.filter;
  return state.filter ? `(${state.filter}) and ${differ}` : differ;
}

export const imageOf = (row, size = "small") => address("image", { a: state.a, shard: row.shard, row: row.row, size }) + (row.uid ? `&u=${encodeURIComponent(row.uid)}` : "");
