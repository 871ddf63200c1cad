// Where the tree is kept, and how it leaves and comes back.

import { add, children, emptyTree, graft, holds, merge, parseTree, toJSON } from "./tree.js";
import { parseAsked } from "./settings.js";
import { lasting } from "./storage.js";

const STORED = "npgpt2.tree", UNREAD = `${STORED}.unread`, PAUSE = 250, MOST = 2e7, MOST_TEXT = 1e6;

/** The tree in this browser's storage, which several tabs share: each saves what all of them wrote. */
export class Store {
  /**
   * came: called when another tab saved something · unread: where what was saved can't be read, with why, and whether it
   * could be kept aside; else nothing is saved in its place
   */
  constructor(came, unread) {
    Object.assign(this, { unread, tree: emptyTree(), saved: null, timer: null, dropped: new Set(), blocked: false });
    this.take(lasting.get(STORED));
    addEventListener("storage", event => {
      if (event.key === STORED && this.take(event.newValue)) came();
    });
    addEventListener("pagehide", () => this.save());
    document.addEventListener("visibilitychange", () => { if (document.hidden) this.save(); });
  }

  /** Add what storage has to what is here. What isn't a tree there, as one of a later version, is kept aside. */
  take(json) {
    if (!json || json === this.saved) return false;
    let stored;
    try {
      stored = parseTree(json, parseAsked, Infinity);
    } catch (error) {
      this.blocked = json !== lasting.get(UNREAD) && !lasting.set(UNREAD, json);
      this.unread(error.message, !this.blocked);
      return false;
    }
    this.blocked = false;
    for (const id of this.dropped) if (!children(stored, id).length) delete stored.nodes[id];
    merge(this.tree, stored);
    if (!holds(stored, this.tree)) this.saved = null; // two tabs can save at the same time, and the later one wins
    return true;
  }

  /** Save in a moment. */
  later() {
    this.timer ??= setTimeout(() => this.save(), PAUSE);
  }

  save() {
    clearTimeout(this.timer);
    this.timer = null;
    this.take(lasting.get(STORED));
    const json = toJSON(this.tree);
    if (!this.blocked && json !== this.saved && lasting.set(STORED, json)) this.saved = json;
  }

  /** Take out a node that nothing came of, unless somebody went on from it all the same. */
  drop(id) {
    if (children(this.tree, id).length) return;
    this.dropped.add(id);
    delete this.tree.nodes[id];
  }

  clear() {
    const last = Object.values(this.tree.nodes).reduce((latest, { made }) => Math.max(latest, made), Date.now());
    merge(this.tree, emptyTree(last));
    for (const key of [UNREAD, STORED]) lasting.remove(key);
    this.blocked = false;
    this.save();
  }
}

/** Have the browser save a file. */
export function download(name, type, text) {
  const link = make("a", { download: name, href: URL.createObjectURL(new Blob([text], { type })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** Put a file's branches into the tree; Error says in a line why not. Returns the node to go to. */
export async function openFile(file, tree) {
  if (file.size > MOST) throw new Error(`${file.name} can't be opened: it is larger than ${MOST / 1e6} MB.`);
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} can't be opened: it is not UTF-8.`);
  }
  if (!/\.json$/i.test(file.name)) {
    if (text.length > MOST_TEXT) {
      throw new Error(`${file.name} can't be opened: it is longer than a million characters.`);
    }
    return add(tree, { text: text.replace(/\r\n?/g, "\n"), kind: "import" });
  }
  let other;
  try {
    other = parseTree(text, parseAsked);
  } catch (error) {
    throw new Error(`${file.name} can't be opened: ${error.message}.`);
  }
  const ids = graft(tree, other);
  if (!ids.length) throw new Error(`${file.name} can't be opened: there is nothing in it.`);
  return ids.at(-1);
}
