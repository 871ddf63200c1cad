// The tree of all that was written: functions on a value that is JSON, and know nothing of the page.
//
// A node is what it changed of its parent's text: the first `keep` characters stay, and `text` follows. So no node ever
// holds a whole story, and whatever is done to one branch leaves all others as they are.
//
//     parent: a node's id, or null · keep, text: see above · kind: write, edit, choose or import
//     tokens: of `text`, where the model said them: [id, what it adds to the text, log-probability] each
//     asked: the request that it answers · finish: why it ended, "writing" while it hasn't
//     name, named: what somebody called it, and when · made: when · rev: how often it changed

export const FORMAT = "npgpt2 tree", VERSION = 1;
const ID = /^n[0-9a-z]{8,24}$/;

export const freshId = () =>
  `n${Array.from(crypto.getRandomValues(new Uint8Array(10)), byte => (byte % 36).toString(36)).join("")}`;

/** cleared: when somebody had everything forgotten, in milliseconds since 1970 */
export const emptyTree = (cleared = 0) => ({ format: FORMAT, version: VERSION, cleared, nodes: {} });

/** When a node is made: after what was forgotten, even where the clock was set back. */
const now = tree => Math.max(Date.now(), tree.cleared + 1);

/** Put a node into the tree. Returns its id. */
export function add(tree, { parent = null, keep = 0, text = "", tokens = [], kind, ...more }) {
  const id = freshId();
  tree.nodes[id] = { parent, keep, text, tokens, kind, made: now(tree), rev: 0, ...more };
  return id;
}

/** Change fields of a node, so that others take it for newer. */
export function change(tree, id, fields) {
  Object.assign(tree.nodes[id], fields);
  tree.nodes[id].rev += 1;
}

/** Nodes from the first of the branch to this one. Of null, none. */
export function pathTo(tree, id) {
  const path = [];
  for (let at = id; at !== null && tree.nodes[at]; at = tree.nodes[at].parent) path.push(at);
  return path.reverse();
}

/** All of the text up to the end of a node. */
export function textOf(tree, id) {
  return pathTo(tree, id).reduce((text, at) => text.slice(0, tree.nodes[at].keep) + tree.nodes[at].text, "");
}

/** The text that a node begins with: what it kept. */
export const keptBy = (tree, id) => textOf(tree, tree.nodes[id].parent).slice(0, tree.nodes[id].keep);

/**
 * The text as pieces with places: tokens, where they are known, and what is between them.
 * Each: start, text, and of a token id, logprob and top, the likeliest in its place, which may be missing.
 * scored: gives the pieces of a text if they are known from elsewhere, for where something is between tokens
 */
export function piecesOf(tree, id, scored = () => undefined) {
  let pieces = [], whole = "";
  for (const at of pathTo(tree, id)) {
    const { keep, text, tokens } = tree.nodes[at];
    whole = whole.slice(0, keep) + text;
    pieces = cut(pieces, keep);
    let start = keep;
    for (const [token, said, logprob, top] of tokens) {
      pieces.push({ start, text: said, id: token, logprob, top });
      start += said.length;
    }
    if (start < whole.length) pieces.push({ start, text: whole.slice(start) });
    if (hasGap(pieces)) pieces = scored(whole) ?? pieces;
  }
  return pieces;
}

/** Whether some of the text is in no token. */
export const hasGap = pieces => pieces.some(piece => piece.id === undefined);

/** Pieces up to a place of the text. A token that goes beyond it is a token no more. */
export function cut(pieces, end) {
  const kept = pieces.filter(piece => piece.start + piece.text.length <= end && (piece.start < end || piece.text));
  const torn = pieces.find(piece => piece.start < end && piece.start + piece.text.length > end);
  if (torn) kept.push({ start: torn.start, text: torn.text.slice(0, end - torn.start) });
  return kept;
}

export const children = (tree, parent) => Object.keys(tree.nodes).filter(id => tree.nodes[id].parent === parent);

/** The nodes that have the same parent, itself among them, in the order in which they were made. */
export const siblings = (tree, id) => id === null ? [] : children(tree, tree.nodes[id].parent);

/** The tree as rows to draw: each node behind its parent; deeper where a parent has several. */
export function rows(tree) {
  const below = new Map();
  for (const [id, { parent }] of Object.entries(tree.nodes)) {
    if (!below.has(parent)) below.set(parent, []);
    below.get(parent).push(id);
  }
  const found = [], waiting = (below.get(null) ?? []).map(id => ({ id, depth: 0, level: 1 })).reverse();
  while (waiting.length) {
    const row = waiting.pop(), under = below.get(row.id) ?? [];
    found.push({ ...row, children: under.length });
    const depth = row.depth + (under.length > 1 ? 1 : 0);
    waiting.push(...under.map(id => ({ id, depth, level: row.level + 1 })).reverse());
  }
  return found;
}

/**
 * What two tabs, or a tab and what it saved, have together: all nodes of both, and of each the newer.
 * Nothing is lost, whoever saves last, but what was there when either had everything forgotten.
 */
export function merge(mine, theirs) {
  mine.cleared = Math.max(mine.cleared, theirs.cleared);
  for (const [id, node] of Object.entries(theirs.nodes)) {
    const own = mine.nodes[id];
    if (!own) mine.nodes[id] = node;
    else {
      const name = (node.named ?? 0) > (own.named ?? 0) ? node : own, called = { name: name.name, named: name.named };
      if (node.rev > own.rev) Object.assign(own, node);
      Object.assign(own, called);
    }
  }
  for (const [id, node] of Object.entries(mine.nodes)) if (node.made <= mine.cleared) delete mine.nodes[id];
  // What was written meanwhile below a forgotten node begins a text of its own.
  for (const node of Object.values(mine.nodes)) {
    if (node.parent !== null && !mine.nodes[node.parent]) Object.assign(node, { parent: null, keep: 0 });
  }
  checkEnds(mine, (node, most) => { node.keep = most; });
  return mine;
}

/** Whether a tree has all that another has, or newer. */
export const holds = (tree, other) => tree.cleared >= other.cleared && Object.entries(other.nodes).every(([id, node]) =>
  tree.nodes[id]?.rev >= node.rev && (tree.nodes[id].named ?? 0) >= (node.named ?? 0));

/** What is saved: all but the likeliest of each place, which can be asked for again. */
export const toJSON = tree => JSON.stringify(tree, (key, value) => key === "tokens" && Array.isArray(value)
  ? value.map(token => token.slice(0, 3)) : value);

// ---- Trees from elsewhere

// nodes: of a file, so that the page can draw them all; one's own tree may have grown beyond
const LIMITS = { nodes: 20000, text: 2e7, tokens: 20000, name: 200 };
const KINDS = ["write", "edit", "choose", "import"];
const isText = (value, most) => typeof value === "string" && value.length <= most;
const isWhole = (value, most) => Number.isInteger(value) && value >= 0 && value <= most;

/**
 * A tree from a file or from storage, with nothing in it but what one has; Error says in a line what is wrong.
 * checkAsked: does the same for the request of a node, or gives back undefined · most: how many nodes it may have
 */
export function parseTree(json, checkAsked, most = LIMITS.nodes) {
  let said;
  try {
    said = JSON.parse(json);
  } catch {
    throw new Error("it is not JSON, or not all of it");
  }
  const isTree = said && said.format === FORMAT && said.nodes && typeof said.nodes === "object";
  if (!isTree) throw new Error("it holds no tree of npgpt2");
  if (said.version !== VERSION) throw new Error(`its version is ${JSON.stringify(said.version)}, not ${VERSION}`);
  const ids = Object.keys(said.nodes);
  if (ids.length > most) throw new Error(`it has ${ids.length} nodes, more than ${most}`);
  const nodes = {};
  for (const id of ids) {
    if (!ID.test(id)) throw new Error("a node has no id of ours");
    nodes[id] = parseNode(said.nodes[id], id, said.nodes, checkAsked);
  }
  const tree = { format: FORMAT, version: VERSION, cleared: isWhole(said.cleared, 1e15) ? said.cleared : 0, nodes };
  checkEnds(tree, (node, most, id) => { throw new Error(`node ${id} keeps more than there is`); });
  return tree;
}

function parseNode(node, id, all, checkAsked) {
  const wrong = what => new Error(`node ${id} ${what}`);
  if (!node || typeof node !== "object") throw wrong("is none");
  const { parent, keep, text, tokens, kind, made, rev, name, named, finish } = node;
  if (parent !== null && !(ID.test(parent) && Object.hasOwn(all, parent))) throw wrong("has a parent that isn't there");
  if (!isText(text, LIMITS.text)) throw wrong("has no text");
  if (!isWhole(keep, LIMITS.text)) throw wrong("doesn't say what it keeps");
  if (!KINDS.includes(kind)) throw wrong("is of no kind of ours");
  const known = Array.isArray(tokens) && tokens.length <= LIMITS.tokens && tokens.every(token => Array.isArray(token)
    && isWhole(token[0], 2 ** 31) && isText(token[1], 1000) && (token[2] === null || Number.isFinite(token[2])));
  if (!known) throw wrong("has tokens that are none");
  if (!text.startsWith(tokens.map(token => token[1]).join(""))) throw wrong("has tokens that don't say its text");
  const kept = { parent, keep, text, tokens: tokens.map(token => token.slice(0, 3)), kind,
    made: isWhole(made, 1e15) ? made : 0, rev: isWhole(rev, 1e9) ? rev : 0 };
  if (isText(name, LIMITS.name) && name) Object.assign(kept, { name, named: isWhole(named, 1e15) ? named : 0 });
  if (["length", "stop", "stopped", "broken", "writing"].includes(finish)) kept.finish = finish;
  const asked = kind === "write" ? checkAsked(node.asked) : undefined;
  return asked ? { ...kept, asked } : kept;
}

/** No node may be its own ancestor. tooMuch(node, most, id): for one that keeps more than there is */
function checkEnds(tree, tooMuch) {
  const lengths = new Map([[null, 0]]), ids = Object.keys(tree.nodes);
  for (const start of ids) {
    const path = [];
    for (let at = start; !lengths.has(at); at = tree.nodes[at].parent) {
      if (path.length > ids.length) throw new Error(`node ${start} is its own ancestor`);
      path.push(at);
    }
    for (const at of path.reverse()) {
      const node = tree.nodes[at], most = lengths.get(node.parent);
      if (node.keep > most) tooMuch(node, most, at);
      lengths.set(at, node.keep + node.text.length);
    }
  }
}

/** Add another tree's branches, as new nodes, so that none of ours is touched. Returns the ids of the new ones. */
export function graft(tree, other) {
  const ids = new Map(Object.keys(other.nodes).map(id => [id, freshId()]));
  for (const [id, node] of Object.entries(other.nodes)) {
    const finish = node.finish === "writing" ? "broken" : node.finish;
    const parent = node.parent === null ? null : ids.get(node.parent);
    tree.nodes[ids.get(id)] = { ...node, parent, finish, made: now(tree) };
  }
  return [...ids.values()];
}
