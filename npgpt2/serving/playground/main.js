// The page, put together.

import { findModel, fitting, Gone, ask, server } from "./api.js";
import { Branches } from "./branches.js";
import { WAYS } from "./copy.js";
import { Desk } from "./desk.js";
import { Editor } from "./editor.js";
import { download, openFile, Store } from "./files.js";
import { drawKeys, listen, nameOf } from "./keys.js";
import { Choices, Places } from "./place.js";
import { parseSettings, Settings } from "./settings.js";
import { lasting, ofTab, problems } from "./storage.js";
import { toJSON } from "./tree.js";
import { Columns } from "./views.js";
import { askedBy, Writer } from "./writing.js";

const $ = id => document.getElementById(id);
const A = "npgpt2.a", HOVER = 300, SOON = 250, INSPECTED = 512, COLOURS = ["off", "probability", "surprisal"];
let colour = lasting.get("npgpt2.colour") ?? "surprisal", kept = lasting.json(A);
let drawing = false, drawn = null;

// ---- What the page is made of

problems.full = () =>
  say("This browser keeps nothing more: save the tree as a file, and have the page forget it (Files).");
const store = new Store(() => { desk.leaveMissing(); writer.leaveMissing(); draw(); }, (why, kept) => say(
  `What this browser had saved can't be read: ${why}. ${kept ? "It is kept aside."
    : "There is no room to keep it aside, so nothing is saved until the page is told to forget everything (Files)."}`));
const writer = new Writer(() => store.tree, {
  grown: draw,
  changed: draw,
  failed: message => say(message),
  ended: id => {
    const node = store.tree.nodes[id];
    if (node && !node.text && node.finish === "broken") {
      if (desk.here === id) desk.go(node.parent, false);
      store.drop(id);
      desk.leaveMissing();
    }
    $("spoken").textContent = node ? `${counted(node.tokens.length)} written` : "";
    draw();
    soon();
  },
});
const settings = new Settings({ first: $("first"), more: $("more") },
  { stop: $("stops"), bias: $("bias"), ends: $("ends"), seed: $("seed"), fixed: $("fixed") },
  () => { drawPlace(); soon(); });
const columns = new Columns($("columns"), $("columns-title"), $("cards"), id => {
  desk.go(id);
  editor.focus(desk.text.length);
  $("sheet").scrollIntoView({ block: "end" });
}, () => editor.focus());
const desk = new Desk(store, writer, settings, columns, { changed: () => { draw(); soon(); } });
const editor = new Editor($("text"), $("behind"), {
  edit: (keep, text) => { choices.close(); desk.edit(keep, text); },
  place: () => { choices.close(); soon(); },
  point: (at, span) => { hovering = setTimeout(() => showChoices(at, span), choices.open ? 60 : HOVER); },
  leave: () => { clearTimeout(hovering); choices.leave(); },
  tap: (at, span) => showChoices(at, span),
});
const places = new Places(() => settings.values, () => desk.window);
const choices = new Choices($("choices"), (at, choice) => {
  choices.close();
  editor.focus();
  run(() => desk.choose(at, choice));
}, () => editor.focus());
const branches = new Branches($("tree"), {
  go: id => desk.go(id || null),
  named: (id, name) => name === null ? draw() : desk.name(id, name),
});
let hovering = null, pointing = null;

// ---- Problems

function say(message) {
  $("notice").textContent = message;
  $("notice").hidden = !message;
}

/** Do something that asks the server, and say what is wrong. A server that is gone says so by itself. */
async function run(action) {
  try {
    if (!server.model) await findModel(); // which wasn't told without a key
    return await action();
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof Gone)) say(error.message);
    return undefined;
  }
}

server.onChange = () => {
  $("dot").classList.toggle("gone", server.gone);
  if (server.gone) say(new Gone().message);
  else if (server.other) say(`Another model answers now: ${server.model.id}.`);
  else if ($("notice").textContent === new Gone().message) say("");
  if (server.other) {
    places.forget();
    desk.forgetScores();
    desk.window = null;
  }
  if (server.model) $("model").textContent = server.gone ? `${server.model.id}, not there` : server.model.id;
  draw();
  if (!server.gone) soon();
};

server.askKey = again => new Promise(resolve => {
  const dialog = $("key-dialog");
  $("key-hint").textContent = again ? "That key isn't the one. It stands in the file that the server was started with."
    : "It stands in the file that the server was started with, and is kept until this tab is closed.";
  const closed = () => resolve(dialog.returnValue === "yes" ? $("key").value.trim() : null);
  dialog.addEventListener("close", closed, { once: true });
  dialog.returnValue = "no";
  $("key").value = "";
  dialog.showModal();
});

// ---- Drawing

/** Draw what changed, when the browser draws next, which it doesn't while the tab is hidden; and save it. */
function draw() {
  store.later();
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    editor.show(desk.text, desk.pieces(), colour);
    if (drawn !== desk.here) choices.close();
    drawn = desk.here;
    branches.draw(store.tree, desk.here, id => writer.isWriting(id));
    columns.draw(store.tree, desk.here, colour, id => writer.isWriting(id));
    drawFigures();
    $("stop").disabled = !writer.busy;
    $("write").disabled = writer.isWriting(desk.here);
    $("undo").disabled = !desk.past.length;
    $("redo").disabled = !desk.future.length;
    $("rename").disabled = desk.here === null;
    $("together").disabled = desk.here === null;
  });
}

function drawFigures() {
  const pieces = desk.pieces(), known = pieces.every(piece => piece.id !== undefined), figures = writer.figures();
  const parts = [];
  const count = known ? pieces.length : desk.counted?.text === desk.text ? desk.counted.count : null;
  if (desk.window) parts.push(["used", `${count === null ? "…" : number(count)} of ${number(desk.window)} tokens`]);
  const longer = count > desk.window || (pieces.length > 1 && pieces[0].id === undefined);
  if (longer) parts.push(["cut", "the model reads the last of them"]);
  if (figures) {
    if (figures.speed) parts.push(["speed", `${number(Math.round(figures.speed))} tokens/s`]);
    parts.push(["wait", `first token after ${Math.round(1000 * figures.wait)} ms`]);
  }
  const { asked, finish } = store.tree.nodes[desk.here] ?? {};
  if (finish === "stop") parts.push(["end", "the model ended the text, or a stop did"]);
  if (asked) parts.push(["with", `temperature ${asked.temperature}, seed ${asked.seed}`]);
  const key = JSON.stringify(parts);
  if ($("figures").dataset.key === key) return;
  $("figures").dataset.key = key;
  $("figures").replaceChildren(...parts.map(([name, text]) => {
    const span = make("span", { textContent: text });
    span.dataset.figure = name;
    return span;
  }));
}

// ---- What comes at a place

let place = null, actual, waiting = null, asking = null, turn = 0;

/** A little later, once nobody types or moves, ask what isn't known of what is shown. */
function soon() {
  const mine = ++turn;
  $("place").setAttribute("aria-busy", "true");
  clearTimeout(waiting);
  waiting = setTimeout(async () => {
    if (!writer.isWriting(desk.here) && !server.gone && server.model) {
      await Promise.all([run(() => desk.score()), run(showPlace)]);
    }
    if (mine === turn) $("place").setAttribute("aria-busy", "false");
  }, SOON);
}

async function showPlace() {
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking, pieces = desk.pieces(), at = document.activeElement === editor.field
    ? editor.pieceAt(editor.caret()) : pieces.length;
  desk.window ??= server.model.max_model_len;
  const found = await places.after(pieces.slice(0, at), signal);
  if (signal.aborted) return;
  place = found;
  actual = pieces[at]?.id;
  $("place-where").replaceChildren(pieces[at] ? "in place of " : "next",
    ...(pieces[at] ? [make("span", { className: "label mono", textContent: visible(pieces[at].text) })] : []));
  drawPlace();
  drawFigures();
}

function drawPlace() {
  if (place) places.draw(place, actual, { bars: $("bars"), summary: $("summary"), rest: $("rest") });
}

/** Show what else could have come in place of a piece: first what came along with it, then all. */
async function showChoices(at, span) {
  if (writer.isWriting(desk.here)) return;
  const pieces = desk.pieces(), piece = pieces[at], { here } = desk;
  const along = piece?.top?.map(([name, logprob]) => ({ id: null, label: visible(name),
    text: name.startsWith("bytes:") ? null : name, before: Math.exp(logprob) }));
  choices.show(at, piece, span, along);
  pointing?.abort();
  pointing = new AbortController();
  const found = await run(() => places.after(pieces.slice(0, at), pointing.signal));
  if (found && choices.open && choices.at === at && here === desk.here) {
    choices.show(at, piece, editor.spanOf(at) ?? span, places.choices(found));
  }
}

/** The same by the keyboard, for where the caret is. */
async function showChoicesHere() {
  const at = editor.pieceAt(editor.caret());
  const shown = showChoices(at, editor.spanOf(at) ?? editor.spanOf(at - 1) ?? editor.field);
  $("choices").tabIndex = -1;
  $("choices").focus();
  await shown;
  if (choices.open) choices.focus();
}

// ---- Dialogs

async function lookInside() {
  const { text } = desk, { from } = await fitting(text, Math.max(0, server.model.max_model_len - INSPECTED));
  const html = await (await ask("inspect", { prompt: text.slice(from) })).text();
  // A page of its own: its scripts run, but in an origin of their own.
  const frame = make("iframe", { srcdoc: html, title: "npgpt2 inspect" });
  frame.setAttribute("sandbox", "allow-scripts");
  $("inspect-place").replaceChildren(frame);
  $("inspect-dialog").showModal();
}

async function copyAs() {
  const { node, prompt, next } = await desk.request(), asked = askedBy(node);
  const where = { base: new URL(".", location).href, key: Boolean(ofTab.get("npgpt2.key")) };
  $("copy-what").textContent = next ? "What Write would ask for now, with the settings and the seed that are shown."
    : "Each gives once more what was written here last: the same request, with the same seed.";
  $("copy-list").replaceChildren(...Object.entries(WAYS).map(([name, make_]) => {
    const text = make_(asked, prompt, where);
    const button = make("button", { type: "button", className: "small", textContent: "Copy" });
    button.setAttribute("aria-label", `copy ${name}`);
    const code = make("pre", { textContent: text, tabIndex: 0 });
    button.addEventListener("click", async () => {
      getSelection().selectAllChildren(code); // to be copied by hand, where the browser doesn't let a page do that
      await navigator.clipboard?.writeText(text);
      button.textContent = navigator.clipboard ? "Copied" : "Selected";
    });
    code.dataset.way = name;
    return make("section", {}, make("div", { className: "head" }, make("h3", { textContent: name }), button), code);
  }));
  $("copy-dialog").showModal();
}

const fileName = () => (desk.text.match(/[\p{L}\p{N}]+/gu) ?? ["text"]).slice(0, 5).join("-").slice(0, 50);

$("export-text").addEventListener("click", () => download(`${fileName()}.txt`, "text/plain", desk.text));
$("export-tree").addEventListener("click", () => download("npgpt2-tree.json", "application/json", toJSON(store.tree)));
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  $("file-problem").textContent = "";
  try {
    if (file) desk.go(await openFile(file, store.tree));
    $("files-dialog").close();
  } catch (error) {
    $("file-problem").textContent = error.message;
  }
  $("file").value = "";
});
$("clear").addEventListener("click", () => $("clear-dialog").showModal());
$("clear-yes").addEventListener("click", () => {
  writer.stop();
  store.clear();
  Object.assign(desk, { here: null, past: [], future: [] });
  desk.remember();
  columns.close();
  for (const dialog of ["clear-dialog", "files-dialog"]) $(dialog).close();
  draw();
});
for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
$("inspect-dialog").addEventListener("close", () => $("inspect-place").replaceChildren());

// ---- What can be done, by button and by key

function cycleColour(value = COLOURS[(COLOURS.indexOf(colour) + 1) % COLOURS.length]) {
  colour = value;
  $("colour").value = colour;
  lasting.set("npgpt2.colour", colour);
  const [least, most] = { surprisal: ["0 bits", "16 bits or more"], probability: ["0 %", "100 %"] }[colour] ?? ["", ""];
  $("scale").hidden = colour === "off";
  $("scale-colours").classList.toggle("cool", colour === "probability");
  $("scale-least").textContent = least;
  $("scale-most").textContent = most;
  draw();
}

function turnTheme() {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const next = (root.dataset.theme ?? (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
  root.dataset.theme = next;
  lasting.set("npgpt2.theme", next);
}

function keepAsA() {
  kept = structuredClone(settings.values);
  lasting.set(A, JSON.stringify(kept));
  $("spoken").textContent = "kept as A";
  $("keep").textContent = "Kept as A";
  setTimeout(() => { $("keep").textContent = "Keep as A"; }, 1500);
}

function compareWithA() {
  if (kept) run(() => desk.compare({ ...settings.values, ...parseSettings(kept) }));
  else say("Keep some settings as A first, then change them: A | B writes with both.");
}

/** Not in a field that has an undo of its own. */
const inText = event => event.target === editor.field || !/^(INPUT|TEXTAREA)$/.test(event.target.tagName);

const ACTIONS = [
  { keys: ["Control+Enter"], what: "write on", button: "write", run: () => run(() => desk.write()) },
  { keys: ["Escape"], what: "close what is open, or stop writing", button: "stop",
    when: () => choices.open || writer.busy || !$("columns").hidden,
    run: event => event.type === "click" ? writer.stop()
      : choices.open ? choices.close(true) : writer.busy ? writer.stop() : columns.close() },
  { keys: ["Alt+KeyP"], what: "what else could have come where the caret is", run: () => showChoicesHere() },
  { keys: ["Control+KeyZ"], what: "undo", button: "undo", when: inText, run: () => desk.undo() },
  { keys: ["Control+Shift+KeyZ", "Control+KeyY"], what: "redo", button: "redo", when: inText, run: () => desk.redo() },
  { keys: ["Control+Shift+Enter"], what: "several continuations side by side", button: "several",
    run: () => run(() => desk.several(Number($("count").value))) },
  { keys: ["Alt+KeyL"], what: "the ladder of temperatures", button: "ladder", run: () => run(() => desk.ladder()) },
  { keys: ["Alt+KeyA"], what: "keep these settings as A", button: "keep", run: keepAsA },
  { keys: ["Alt+KeyB"], what: "A and these settings side by side", button: "compare", run: compareWithA },
  { keys: ["Alt+ArrowUp"], what: "back to what was before, in the tree", run: () => desk.up() },
  { keys: ["Alt+ArrowDown"], what: "on to what followed", run: () => desk.down() },
  { keys: ["Alt+ArrowLeft"], what: "the sibling before", run: () => desk.beside(-1) },
  { keys: ["Alt+ArrowRight"], what: "the sibling after", run: () => desk.beside(1) },
  { keys: ["Alt+KeyG"], what: "siblings side by side", button: "together", run: () => desk.together() },
  { keys: ["Alt+KeyN"], what: "a new text", button: "new", run: () => { desk.begin(); editor.focus(); } },
  { keys: ["Alt+KeyM"], what: "name this branch", button: "rename", run: () => branches.name(desk.here) },
  { keys: ["Alt+KeyT"], what: "to the tree: arrows go about in it, Enter names", run: () => branches.focus() },
  { keys: ["Alt+KeyE"], what: "to the text", run: () => editor.focus() },
  { keys: ["Alt+KeyS"], what: "to the settings", run: () => $("range-temperature").focus() },
  { keys: ["Alt+KeyR"], what: "all settings as they were at first", button: "reset", run: () => settings.reset() },
  { keys: ["Alt+KeyC"], what: "colour by nothing, probability, surprisal", run: () => cycleColour() },
  { keys: ["Alt+KeyI"], what: "look inside: attention and logit lens", button: "inspect", run: () => run(lookInside) },
  { keys: ["Alt+KeyK"], what: "copy as a command", button: "copy", run: () => run(copyAs) },
  { keys: ["Alt+KeyF"], what: "files: save and open", button: "files",
    run: () => { $("file-problem").textContent = ""; $("files-dialog").showModal(); } },
  { keys: ["Alt+KeyD"], what: "light or dark", button: "theme", run: turnTheme },
  { keys: ["?", "Alt+KeyH"], what: "this list", button: "keys", run: () => $("keys-dialog").showModal() },
];

function setUp() {
  for (const action of ACTIONS) {
    const { run: act } = action;
    action.run = event => {
      if (!server.gone) say(""); // what was wrong before
      act(event);
    };
  }
  for (const { keys, what, button, run: act } of ACTIONS.filter(action => action.button)) {
    $(button).addEventListener("click", act);
    $(button).title = `${what} (${nameOf(keys[0])})`;
    $(button).setAttribute("aria-keyshortcuts", keys.join(" ").replaceAll("Key", ""));
  }
  listen(ACTIONS);
  drawKeys(ACTIONS, $("keys-list"));
  for (let n = 2; n <= 8; n++) $("count").append(make("option", { value: n, textContent: n, selected: n === 4 }));
  $("close").addEventListener("click", () => columns.close());
  $("colour").addEventListener("change", () => cycleColour($("colour").value));
  cycleColour(COLOURS.includes(colour) ? colour : "surprisal");
  editor.field.addEventListener("beforeinput", event => {
    if (!/^history/.test(event.inputType)) return;
    event.preventDefault(); // the browser's own knows nothing of what the model wrote
    if (event.inputType === "historyUndo") desk.undo();
    else desk.redo();
  });
  columns.closed = () => editor.focus();
}

setUp();
draw();
document.addEventListener("visibilitychange", () => {
  drawing = false; // a hidden tab can lose what it was to draw
  draw();
});
await run(() => server.model);
writer.resume();
editor.focus(desk.text.length);
document.body.dataset.ready = "yes";
