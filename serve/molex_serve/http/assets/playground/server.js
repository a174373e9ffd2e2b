// Requests to the server that this page came from. What it refuses is thrown as a Refusal, in its own words.

import { eventsOf } from "./events.js";
import { authorization } from "./keys.js";

export class Refusal extends Error {
  constructor({ message, code }, status, retryAfter) {
    const wait = retryAfter ? ` (try again in ${retryAfter} s)` : "";
    super([status, code].filter(Boolean).join(" ") + `: ${message}${wait}`);
    this.status = status;
  }
}

export async function listModels() {
  return (await (await request("GET", "v1/models")).json()).data;
}

export async function loadAdapter(alias, path, pin) {
  return (await request("POST", "v1/adapters", { admin: true, body: { alias, path, pin } })).json();
}

// Of the generation that is shown, and no other that has come in its place meanwhile.
export async function unloadAdapter({ id, generation }) {
  const shown = generation === null ? "" : `?expected_generation=${encodeURIComponent(generation)}`;
  await request("DELETE", `v1/adapters/${encodeURIComponent(id)}${shown}`, { admin: true });
}

// The chunks of a streamed answer. Aborting the signal ends the request on the server too.
export async function* stream(path, body, signal) {
  const response = await request("POST", path, { body, signal });
  for await (const chunk of eventsOf(response.body)) {
    if (chunk.error) throw new Refusal(chunk.error);
    yield chunk;
  }
}

async function request(method, path, { admin = false, body, signal } = {}) {
  const headers = authorization(admin);
  if (body) headers["Content-Type"] = "application/json";
  const sent = { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
  const response = await fetch(path, sent);
  if (!response.ok) throw await refusalOf(response);
  return response;
}

// A proxy in between may answer with something else than JSON.
async function refusalOf(response) {
  const text = await response.text();
  let error = { message: text || response.statusText };
  try {
    error = JSON.parse(text).error ?? error;
  } catch (notJson) {
    if (!(notJson instanceof SyntaxError)) throw notJson;
  }
  return new Refusal(error, response.status, response.headers.get("Retry-After"));
}
