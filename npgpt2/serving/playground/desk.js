// What is on the desk: which node's text is shown, the way that led there, and what happens to it.

import { fitting, score, server } from "./api.js";
import { add, change, children, hasGap, keptBy, piecesOf, siblings, textOf } from "./tree.js";
import { LADDER } from "./views.js";
import { SAMPLERS } from "./settings.js";
import { lasting, ofTab } from "./storage.js";

const HERE = "npgpt2.here", LAST = "npgpt2.last", PAUSE_IN_TYPING = 2000, MOST_STEPS = 500, MOST_SCORES = 60;

export class Desk {
  /** store, writer, settings, columns: see there · on: changed(), something is to be drawn · say(message), problems */
  constructor(store, writer, settings, columns, on) {
    Object.assign(this, { store, writer, settings, columns, on });
    Object.assign(this, { scores: new Map(), mine: new Set(), typed: 0, window: null, counted: null, preparing: false });
    const left = ofTab.json(HERE) ?? { here: lasting.get(LAST), past: [], future: [] };
    Object.assign(this, { here: left.here, past: left.past, future: left.future });
    this.leaveMissing();
  }

  has(id) {
    return id === null || Boolean(this.tree.nodes[id]);
  }

  /** Forget the way to what is in the tree no more, as when another tab had everything forgotten. */
  leaveMissing() {
    this.past = this.past.filter(id => this.has(id));
    this.future = this.future.filter(id => this.has(id));
    if (!this.has(this.here)) this.here = null;
  }

  get tree() {
    return this.store.tree;
  }

  get text() {
    return textOf(this.tree, this.here);
  }

  // ---- Going about

  /** Show another node's text. back: whether undo leads back to the one before */
  go(id, back = true) {
    if (id === this.here || !this.has(id)) return;
    if (back) {
      this.past = [...this.past, this.here].slice(-MOST_STEPS);
      this.future = [];
    }
    this.here = id;
    this.typed = 0;
    this.remember();
    this.on.changed();
  }

  remember() {
    const { here, past, future } = this;
    ofTab.set(HERE, JSON.stringify({ here, past, future }));
    if (here === null) lasting.remove(LAST);
    else lasting.set(LAST, here);
  }

  undo() {
    if (this.past.length) this.step("past", "future");
  }

  redo() {
    if (this.future.length) this.step("future", "past");
  }

  step(from, to) {
    this[to].push(this.here);
    this.go(this[from].pop(), false);
  }

  up() {
    if (this.here !== null) this.go(this.tree.nodes[this.here].parent);
  }

  /** To the child that was seen last, or else the newest. */
  down() {
    const below = children(this.tree, this.here);
    const seen = [...this.future, ...this.past].reverse().find(id => below.includes(id));
    if (below.length) this.go(seen ?? below.at(-1));
  }

  beside(step) {
    const all = siblings(this.tree, this.here), at = all.indexOf(this.here) + step;
    if (all[at]) this.go(all[at]);
  }

  // ---- The text's tokens

  /** The text of a node as pieces, with probabilities as far as they are known. */
  pieces(id = this.here) {
    return piecesOf(this.tree, id, text => this.scores.get(text));
  }

  /** Ask for the probabilities of what is shown, where they aren't known. */
  async score() {
    const { text } = this;
    if (!text || this.scores.has(text) || !hasGap(this.pieces())) return;
    const { from, count, window } = await fitting(text, 0);
    Object.assign(this, { window, counted: { text, count } });
    const pieces = (await score(text.slice(from))).map(piece => ({ ...piece, start: piece.start + from }));
    if (from) pieces.unshift({ start: 0, text: text.slice(0, from) });
    this.scores.set(text, pieces);
    if (this.scores.size > MOST_SCORES) this.scores.delete(this.scores.keys().next().value);
    this.on.changed();
  }

  forgetScores() {
    this.scores.clear();
  }

  // ---- Changing it

  /** Somebody changed what follows the first `keep` characters. Typing in one go is one node. */
  edit(keep, text) {
    const node = this.here === null ? null : this.tree.nodes[this.here];
    const whole = this.text.slice(0, keep) + text, now = Date.now();
    const goesOn = node?.kind === "edit" && this.mine.has(this.here) && now - this.typed < PAUSE_IN_TYPING
      && !children(this.tree, this.here).length;
    if (goesOn) {
      const kept = Math.min(node.keep, keep);
      change(this.tree, this.here, { keep: kept, text: whole.slice(kept) });
      this.on.changed();
    } else {
      const id = add(this.tree, { parent: this.here, keep, text, kind: "edit" });
      this.mine.add(id);
      this.go(id);
    }
    this.typed = now;
  }

  /** Put another token in the place of a piece, without what follows it, and go on from there. */
  choose(at, { id, text, before }) {
    const piece = this.pieces()[at], keep = piece ? piece.start : this.text.length;
    const tokens = id === null ? [] : [[id, text, Math.log(before)]];
    this.go(add(this.tree, { parent: this.here, keep, text, tokens, kind: "choose" }));
    return this.write();
  }

  name(id, name) {
    // A name has a time of its own: the node is no newer by it than in the tab that is just writing it.
    if (this.has(id)) Object.assign(this.tree.nodes[id], { name: name || undefined, named: Date.now() });
    this.on.changed();
  }

  // ---- Having it written on

  /** Nodes for requests that differ in some settings, all of them below what is shown; none where that is going on. */
  async prepare(variants) {
    if (this.preparing) return [];
    this.preparing = true;
    try {
      return await this.nodesFor(variants);
    } finally {
      this.preparing = false;
    }
  }

  async nodesFor(variants) {
    const { here, text } = this, { max_tokens: length } = this.settings.values;
    const most = Math.max(...variants.map(variant => variant.max_tokens ?? length));
    const { from, window } = await fitting(text, Math.min(most, (this.window ?? Infinity) - 1));
    this.window = window;
    if (here !== this.here || text !== this.text) return this.nodesFor(variants); // somebody typed meanwhile
    const seed = this.settings.seed();
    return variants.map(({ offset = 0, ...variant }) => {
      const asked = this.settings.asked(server.model.id, from, { ...variant, seed: seed + offset });
      asked.max_tokens = Math.min(asked.max_tokens, window - 1);
      asked.min_tokens = Math.min(asked.min_tokens, asked.max_tokens);
      return add(this.tree, { parent: here, keep: text.length, kind: "write", asked, finish: "writing" });
    });
  }

  async write() {
    if (this.writer.isWriting(this.here)) return;
    const [id] = await this.prepare([{}]);
    if (!id) return;
    this.go(id);
    await this.writer.write([id]);
  }

  /** Several at once, side by side. heads: what to write above each */
  async open(title, variants, heads, what = "") {
    const ids = await this.prepare(variants);
    if (!ids.length) return;
    const { seed } = this.tree.nodes[ids[0]].asked;
    this.columns.open(title.replace("SEED", seed), ids.map((id, i) => ({ id, head: heads[i], what })));
    this.columns.focus();
    this.on.changed();
    await this.writer.write(ids);
  }

  several(count) {
    const each = [...Array(count).keys()];
    const heads = each.map(i => `${i + 1}`);
    return this.open(`${count} continuations`, each.map(offset => ({ offset })), heads, "continuation ");
  }

  ladder() {
    const variants = LADDER.map(temperature => ({ temperature }));
    return this.open("By temperature: one prompt, one seed (SEED)", variants, LADDER.map(String), "temperature ");
  }

  /** Two settings, with one seed. */
  compare(first) {
    const second = this.settings.values, names = Object.keys(SAMPLERS).filter(name => first[name] !== second[name]);
    const shown = names.length ? names : ["temperature"];
    const head = (letter, values) =>
      `${letter}: ${shown.map(name => `${SAMPLERS[name].label} ${values[name]}`).join(", ")}`;
    return this.open("Two settings, both with seed SEED", [first, second].map(values => structuredClone(values)),
      [head("A", first), head("B", second)]);
  }

  /** What has the same parent, beside each other. */
  together() {
    if (this.here === null) return;
    const all = siblings(this.tree, this.here);
    const head = (id, i) => this.tree.nodes[id].name || `${i + 1} of ${all.length}`;
    this.columns.open("Siblings", all.map((id, i) => ({ id, head: head(id, i) })));
    this.columns.focus(all.indexOf(this.here));
    this.on.changed();
  }

  /** A text of its own, beside all others. */
  begin() {
    this.go(null);
  }

  /** What was written last of what is shown: its node and what it read; or else what Write would ask for now. */
  async request() {
    const node = this.here === null ? null : this.tree.nodes[this.here];
    if (node?.asked) return { node, prompt: keptBy(this.tree, this.here).slice(node.asked.from) };
    const { text } = this, { from, window } = await fitting(text, this.settings.values.max_tokens);
    const asked = this.settings.asked(server.model.id, from);
    asked.max_tokens = Math.min(asked.max_tokens, window - 1);
    return { node: { asked, tokens: [], finish: "length" }, prompt: text.slice(from), next: true };
  }
}
