// The server: questions, streams, and what to say when it isn't there.

import { ofTab } from "./storage.js";

/** What the server refused, or couldn't do. message: for whoever sits before the page · status: HTTP's */
export class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The server is not to be reached. */
export class Gone extends Error {
  constructor() {
    super("The server doesn't answer. Start it again with npgpt2 serve: this page goes on when it is back.");
  }
}

export const server = {
  model: null, // what /v1/models says of it, once it answered
  gone: false,
  onChange: () => {}, // called when it goes, and when it is back
  askKey: async () => null, // asks for the key, where one is needed
};

const KEY = "npgpt2.key";

function headers(body) {
  const key = ofTab.get(KEY);
  const type = body ? { "Content-Type": "application/json" } : {};
  return key ? { ...type, Authorization: `Bearer ${key}` } : type;
}

/** An answer that is one, whatever it holds. body: sent as JSON, if there is one */
export async function ask(path, body, signal) {
  const used = ofTab.get(KEY);
  let response;
  try {
    const request = body ? { method: "POST", body: JSON.stringify(body) } : {};
    response = await fetch(path, { ...request, headers: headers(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    lose();
    throw new Gone();
  }
  if (response.ok) return response;
  if (response.status === 503) {
    lose();
    throw new Gone();
  }
  if (response.status === 401 && await findKey(used)) return ask(path, body, signal);
  throw await refusal(response);
}

let asking = null;

/** Have somebody give the key, once for all that want it. used: the one that wasn't right → whether there is one */
async function findKey(used) {
  if (ofTab.get(KEY) !== used) return true; // which came meanwhile
  asking ??= server.askKey(used !== null).finally(() => { asking = null; });
  const key = await asking;
  if (key) ofTab.set(KEY, key);
  return Boolean(key);
}

async function refusal(response) {
  let said;
  try {
    said = (await response.json()).error.message;
  } catch {
    said = `It answered with status ${response.status}.`;
  }
  const what = {
    401: "The server wants its key: reload the page to be asked for it again.",
    429: "The server has as many requests as it takes. Try again in a moment.",
  }[response.status];
  return new Refused(what ?? said, response.status);
}

/** What a stream says, one JSON value after another. An error within it is thrown. */
export async function* stream(path, body, signal) {
  const response = await ask(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      lose();
      throw new Gone();
    }
    if (part.done) break;
    const events = (waiting + part.value).split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter(line => line.startsWith("data: ")).map(line => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue; // a comment, which keeps the line open
      const said = JSON.parse(data);
      if (/shutting down/.test(said.error?.message)) {
        lose();
        throw new Gone();
      }
      if (said.error) throw new Refused(said.error.message, 500);
      yield said;
    }
  }
  lose(); // it ended without saying so
  throw new Gone();
}

// ---- Going and coming back

let waiting = null;

function lose() {
  server.gone = true;
  server.onChange();
  waiting ??= comeBack().finally(() => { waiting = null; });
}

async function comeBack() {
  for (let pause = 500; server.gone; pause = Math.min(5000, pause * 1.3)) {
    await new Promise(resolve => setTimeout(resolve, pause));
    try {
      await findModel();
    } catch (error) {
      if (error instanceof Gone) continue;
      server.gone = false; // it answers, whatever it has against it
      server.onChange();
    }
  }
}

/** Resolves when the server is there again; true where it is another model that answers. */
export async function whenBack() {
  const before = server.model;
  if (waiting) await waiting;
  return Boolean(before && server.model && identity(before) !== identity(server.model));
}

const identity = ({ created, ...rest }) => JSON.stringify(rest);

/** Ask which model there is. */
export async function findModel() {
  let response;
  try {
    response = await fetch("v1/models", { headers: headers() });
  } catch {
    if (!server.gone) lose();
    throw new Gone();
  }
  if (response.status === 401) response = await ask("v1/models");
  if (response.status === 503) throw new Gone();
  if (!response.ok) throw await refusal(response);
  const [model] = (await response.json()).data;
  const first = !server.model;
  server.other = Boolean(server.model && identity(server.model) !== identity(model));
  server.model = model;
  if (first || server.gone || server.other) {
    server.gone = false;
    server.onChange();
  }
  return model;
}

// ---- Questions about a text

// Characters that are looked at of the end of a text: more than fit into any model's window.
const LONGEST = 100000;

/** Its tokens, and how many the model takes. */
export const tokenize = async (prompt, signal) => (await ask("tokenize", { prompt }, signal)).json();

/**
 * The end of a text that fits the model's window with so many more tokens: what the model is given to read.
 * Returns the place where it begins, how many tokens the text has, null where that are too many to count, and how many
 * the model takes.
 */
export async function fitting(text, more, signal) {
  const end = text.slice(-LONGEST), { count, tokens, max_model_len: window } = await tokenize(end, signal);
  const room = Math.max(1, window - more);
  if (count <= room) return { from: 0, count, window };
  // Where the cut goes through a character, what is left isn't the text's end: begin a little later.
  for (let skip = 0; skip < 8; skip++) {
    const { prompt } = await (await ask("detokenize", { tokens: tokens.slice(skip - room) }, signal)).json();
    if (text.endsWith(prompt)) return { from: text.length - prompt.length, count: end === text ? count : null, window };
  }
  throw new Refused("The text is longer than the model's window, and its end can't be cut off: shorten it.");
}

/** What can come next, as distribution.js takes it; see npgpt2/study/distribution.py. */
export const placeAfter = async (body, signal) => (await ask("distribution", body, signal)).json();

/** The tokens of a text with their probabilities, as pieces as `piecesOf` has them. */
export async function score(text, signal) {
  const body = { prompt: text, max_tokens: 0, echo: true, logprobs: 10, return_token_ids: true };
  const [choice] = (await (await ask("v1/completions", body, signal)).json()).choices;
  const { tokens, token_logprobs: logprobs, top_logprobs: tops, text_offset: offsets } = choice.logprobs;
  const characters = [...choice.text], pieces = [];
  let start = 0;
  tokens.forEach((_, i) => {
    const said = characters.slice(offsets[i], offsets[i + 1] ?? characters.length).join("");
    pieces.push({ start, text: said, id: choice.prompt_token_ids[i], logprob: logprobs[i], top: topOf(tops[i]) });
    start += said.length;
  });
  return pieces;
}

/** The likeliest of a place as [name, log-probability], from the first on. */
export const topOf = top => top ? Object.entries(top).sort((a, b) => b[1] - a[1]).slice(0, 10) : null;
