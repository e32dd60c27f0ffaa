// Talks to the server that this page came from. The token lives here, in memory, and nowhere else.

let token = "";

export function useToken(given) {
  token = given.trim();
}

export const hasToken = () => token !== "";

/** A refusal with what the server says of it. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Ask for a path relative to this page; the answer may be any status.
 *  @throws {TypeError | DOMException} the server cannot be reached, or not in time */
export async function ask(path, options = {}, limit_s = 60) {
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  return fetch(path, { cache: "no-store", credentials: "omit", ...options, headers, signal: AbortSignal.timeout(limit_s * 1000) });
}

/** What a refusal says: the protocol's `error`, else the body as it is. */
export async function refusal(response) {
  const text = (await response.text()).slice(0, 2000);
  try {
    return new Refused(response.status, String(JSON.parse(text).error ?? text));
  } catch {
    return new Refused(response.status, text || response.statusText || "no reason is given");
  }
}

/** The server's state, in the words of /v2/onecard/state. */
export async function state() {
  const response = await ask("v2/onecard/state", {}, 5);
  if (!response.ok) throw await refusal(response);
  return response.json();
}
