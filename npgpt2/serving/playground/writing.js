// Letting the model write: requests, the nodes that their answers grow into, and what happens when the line breaks.

import { Gone, Refused, stream, topOf, whenBack } from "./api.js";
import { bodyOf } from "./settings.js";
import { ofTab } from "./storage.js";
import { change, children, keptBy } from "./tree.js";

// At most so many go into one stream.
const STORED = "npgpt2.writing", MOST = 16;
const FOR_THE_PAGE = { stream: true, logprobs: 10, return_token_ids: true, stream_options: { include_usage: true } };

/** What a node was given to read. */
export const promptOf = (tree, id) => keptBy(tree, id).slice(tree.nodes[id].asked.from);

/** The request behind a node for elsewhere: one that was stopped asks for as many tokens as there are. */
export function askedBy(node) {
  const { asked, tokens, finish } = node;
  return finish === "length" || finish === "stop" ? asked : { ...asked, max_tokens: Math.max(1, tokens.length) };
}

export class Writer {
  /** tree: gives the tree · on: grown(id), ended(id), failed(message), changed() when a run begins or ends */
  constructor(tree, on) {
    Object.assign(this, { tree, on, runs: new Set() });
  }

  isWriting(id) {
    return [...this.runs].some(run => run.open.has(id));
  }

  get busy() {
    return this.runs.size > 0;
  }

  /** Nodes that were being written when the page was left: they are asked for again, and go on. */
  resume() {
    const left = (ofTab.json(STORED) ?? []).filter(id => this.tree().nodes[id]?.asked);
    for (let i = 0; i < left.length; i += MOST) this.write(left.slice(i, i + MOST));
  }

  remember() {
    ofTab.set(STORED, JSON.stringify([...this.runs].flatMap(run => [...run.open])));
    this.on.changed();
  }

  stop() {
    for (const run of this.runs) run.controller.abort();
  }

  /** Stop what is written for nodes that are there no more, as when another tab had everything forgotten. */
  leaveMissing() {
    for (const run of this.runs) if (![...run.open].some(id => this.tree().nodes[id])) run.controller.abort();
  }

  /**
   * Have nodes written, all in one stream. What they have already is what the same request gives once more, so that one
   * that broke off goes on where it was.
   */
  async write(ids) {
    const run = { ids, open: new Set(ids), controller: new AbortController(), at: ids.map(() => 0),
      begun: performance.now(), first: null, last: null, tokens: 0 };
    this.runs.add(run);
    this.latest = run;
    this.remember();
    try {
      for (;;) {
        try {
          await this.read(run);
          break;
        } catch (error) {
          if (!(error instanceof Gone)) throw error;
          if (await this.another(run)) {
            throw new Refused("Another model answers now. What was being written stays as it is.");
          }
          run.at.fill(0);
        }
      }
    } catch (error) {
      const stopped = error.name === "AbortError";
      if (!stopped) this.on.failed(error.message);
      for (const id of run.open) this.end(run, id, stopped ? "stopped" : "broken");
    }
    this.runs.delete(run);
    this.remember();
  }

  /** Wait until the server is back, or somebody stops; true where it is another model. */
  async another(run) {
    const aborted = new Promise((_, reject) => {
      run.controller.signal.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
    });
    return Promise.race([whenBack(), aborted]);
  }

  async read(run) {
    const tree = this.tree();
    const bodies = run.ids.map(id => ({ ...bodyOf(tree.nodes[id].asked, promptOf(tree, id)), ...FOR_THE_PAGE }));
    const [path, body] = bodies.length > 1 ? ["together", { requests: bodies }] : ["v1/completions", bodies[0]];
    for await (const said of stream(path, body, run.controller.signal)) {
      for (const choice of said.choices) this.take(run, choice);
    }
    for (const id of run.open) this.end(run, id, "length");
  }

  take(run, { index, text, token_ids: ids = [], logprobs, finish_reason: reason }) {
    const id = run.ids[index], node = this.tree().nodes[id];
    if (!run.open.has(id) || !node) return;
    ids.forEach((token, i) => {
      run.first ??= performance.now();
      run.last = performance.now();
      run.tokens += 1;
      const logprob = logprobs?.token_logprobs[i] ?? null, top = topOf(logprobs?.top_logprobs[i]);
      this.add(run, index, [token, i ? "" : text, logprob, top]);
    });
    if (!ids.length && text) change(this.tree(), id, { text: node.text + text });
    if (reason === "stop") cutEnd(node);
    if (reason) this.end(run, id, reason);
    else this.on.grown(id);
  }

  add(run, index, token) {
    const tree = this.tree(), id = run.ids[index], node = tree.nodes[id], at = run.at[index]++;
    const known = node.tokens[at];
    if (known?.[0] === token[0]) {
      known[3] = token[3];
      return;
    }
    if (known || node.text.length > lengthOf(node.tokens)) {
      if (children(tree, id).length) throw new Refused("It is written otherwise this time: write on from here again.");
      node.tokens.length = Math.min(at, node.tokens.length);
      node.text = node.text.slice(0, lengthOf(node.tokens));
    }
    node.tokens.push(token);
    change(tree, id, { text: node.text + token[1] });
  }

  end(run, id, finish) {
    run.open.delete(id);
    if (this.tree().nodes[id]) change(this.tree(), id, { finish });
    this.remember();
    this.on.ended(id);
  }

  /** How it goes: tokens per second, and seconds to the first token. Of the last run, if none goes on. */
  figures() {
    const { begun, first, last, tokens } = this.latest ?? {};
    if (!first) return null;
    return { wait: (first - begun) / 1000, tokens, speed: tokens > 1 ? 1000 * (tokens - 1) / (last - first) : null };
  }
}

const lengthOf = tokens => tokens.reduce((sum, token) => sum + token[1].length, 0);

/** The token that ended a text says less in it than elsewhere, or nothing: it is no token of the text. */
function cutEnd(node) {
  let token = node.tokens.pop();
  while (token && token[1] === "" && node.tokens.at(-1)?.[1] === "") token = node.tokens.pop();
}
