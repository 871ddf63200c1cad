// The tree as a list to go about in.

import { pathTo, rows } from "./tree.js";

const SIGNS = { write: "▸", edit: "✎", choose: "◆", import: "⤓" };
const KINDS = {
  write: "written by the model", edit: "typed", choose: "a token that was chosen", import: "opened from a file",
};
const LONGEST = 60;

export class Branches {
  /** list: the element · on: go(id), named(id, name) */
  constructor(list, on) {
    Object.assign(this, { list, on, naming: null });
    list.addEventListener("click", event => {
      const row = event.target.closest("[data-id]");
      if (row && !event.target.closest("input")) on.go(row.dataset.id);
    });
    list.addEventListener("dblclick", event => {
      const row = event.target.closest("[data-id]");
      if (row) this.name(row.dataset.id);
    });
    list.addEventListener("keydown", event => this.key(event));
  }

  /** tree · here: the node whose text is shown · isWriting: whether a node grows */
  draw(tree, here, isWriting) {
    const drawn = [{ id: "", depth: 0, level: 1, root: true }, ...rows(tree)], path = new Set(pathTo(tree, here));
    const focused = this.list.contains(document.activeElement) && !this.naming;
    const old = new Map([...this.list.children].map(row => [row.dataset.id, row]));
    const made = drawn.map(row => {
      const element = old.get(row.id) ?? make("li");
      if (row.id !== this.naming) this.fill(element, row, tree.nodes[row.id], isWriting(row.id));
      const chosen = row.id === (here ?? "");
      element.setAttribute("aria-selected", chosen);
      element.tabIndex = chosen ? 0 : -1;
      element.classList.toggle("path", path.has(row.id));
      return element;
    });
    const { children } = this.list;
    const differs = made.length !== children.length || made.some((element, i) => element !== children[i]);
    if (differs && !this.naming) { // which would take the field from under somebody's hands
      this.list.replaceChildren(...made);
    }
    const now = this.list.querySelector("[aria-selected=true]");
    if (here !== this.here) now?.scrollIntoView({ block: "nearest" });
    this.here = here;
    if (focused) now?.focus();
  }

  fill(element, { id, depth, level, root }, node, writing) {
    const said = root ? "the beginning" : snippet(node);
    const state = `${said}|${depth}|${writing}|${node?.name ?? ""}|${node?.kind}`;
    if (element.dataset.state === state) return;
    element.dataset.state = state;
    element.dataset.id = id;
    element.setAttribute("role", "treeitem");
    element.setAttribute("aria-level", level);
    element.style.setProperty("--depth", Math.min(depth, 8));
    element.classList.toggle("writing", writing);
    element.classList.toggle("named", Boolean(node?.name));
    const kind = root ? "" : KINDS[node.kind];
    const sign = make("span", { className: "sign", textContent: root ? "○" : SIGNS[node.kind], title: kind });
    sign.setAttribute("aria-hidden", "true");
    element.replaceChildren(sign, make("span", { className: "said", textContent: said }));
    const asked = node?.asked;
    if (asked) element.append(make("span", { className: "how dim", textContent: `t ${asked.temperature}` }));
    element.title = asked ? `${kind}, temperature ${asked.temperature}, seed ${asked.seed}` : kind;
  }

  key(event) {
    if (this.naming !== null) return;
    const row = event.target.closest("[data-id]");
    const all = [...this.list.children], at = all.indexOf(row);
    const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 };
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key in moves) this.on.go(all[Math.max(0, Math.min(all.length - 1, moves[event.key]))].dataset.id);
    else if (event.key === "F2" || event.key === "Enter") this.name(row.dataset.id);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  focus() {
    this.list.querySelector("[aria-selected=true]")?.focus();
  }

  /** Let somebody name a node, in its own row. */
  name(id) {
    const row = [...this.list.children].find(row => row.dataset.id === id), said = row?.querySelector(".said");
    if (!id || !said || this.naming) return;
    this.naming = id;
    const field = make("input", { value: row.classList.contains("named") ? said.textContent : "", maxLength: 80,
      placeholder: "a name" });
    field.setAttribute("aria-label", "name of this branch");
    const done = keep => {
      if (this.naming !== id) return;
      this.naming = null;
      row.dataset.state = "";
      this.on.named(id, keep ? field.value.trim() : null);
      this.focus();
    };
    field.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === "Escape") {
        event.preventDefault();
        event.stopPropagation();
        done(event.key === "Enter");
      }
    });
    field.addEventListener("blur", () => done(true));
    said.replaceWith(field);
    field.focus();
  }
}

/** What a node is called, or else how it begins. */
function snippet(node) {
  if (node.name) return node.name;
  const text = node.text.replace(/[\s\p{C}]+/gu, " ").trim();
  return text.length > LONGEST ? `${text.slice(0, LONGEST)}…` : text || (node.text ? "white space" : "nothing");
}
