// The keyboard: one list, which is what is done and what is shown by `?`.

export const MAC = /Mac|iPhone|iPad/.test(navigator.platform);
const NAMES = {
  Control: MAC ? "⌘" : "Ctrl", Alt: MAC ? "⌥" : "Alt", Shift: MAC ? "⇧" : "Shift",
  ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", Escape: "Esc",
};

/** How a key is written: of "Control+Shift+KeyZ", Ctrl+Shift+Z. */
export const nameOf = key => key.split("+").map(part => NAMES[part] ?? part.replace(/^Key|^Digit/, "")).join("+");

/** Which key an event is, in the same way as the list has them: letters by their place on the keyboard. */
function keyOf(event) {
  const parts = [];
  if (MAC ? event.metaKey : event.ctrlKey) parts.push("Control");
  if (event.altKey) parts.push("Alt");
  if (event.shiftKey && event.key !== "?") parts.push("Shift");
  parts.push(event.key === "?" ? "?" : /^Key/.test(event.code) ? event.code : event.key);
  return parts.join("+");
}

const isField = element => /^(TEXTAREA|SELECT)$/.test(element.tagName)
  || (element.tagName === "INPUT" && !/^(range|checkbox)$/.test(element.type));

/**
 * Listen to all keys. list: [{keys, what, run, when}]: several keys for one thing, what it does in words, and, if there
 * is a `when`, whether it does that now
 */
export function listen(list) {
  document.addEventListener("keydown", event => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const key = keyOf(event);
    const found = list.find(({ keys, when }) => keys.includes(key) && (!when || when(event)));
    if (!found || (key === "?" && isField(event.target))) return;
    event.preventDefault();
    found.run(event);
  });
}

/** Draw the list as a table. */
export function drawKeys(list, table) {
  const written = keys => keys.flatMap((key, i) => [i ? " or " : "", make("kbd", { textContent: nameOf(key) })]);
  table.replaceChildren(...list.map(({ keys, what }) => make("tr", {}, make("th", { scope: "row" }, ...written(keys)),
    make("td", { textContent: what }))));
}
