// Several texts side by side: continuations, the ladder of temperatures, two settings, siblings.

import { drawPieces } from "./editor.js";
import { piecesOf } from "./tree.js";

export const LADDER = [0, 0.5, 0.7, 1, 1.1, 1.2, 1.3, 100];

export class Columns {
  /** box: the section, with its title and cards · take(id): somebody goes on with one · closed(): it is closed */
  constructor(box, title, cards, take, closed) {
    Object.assign(this, { box, title, cards, take, closed, shown: [] });
    cards.addEventListener("keydown", event => this.key(event));
  }

  /** shown: [{id, head, what}], a node, what to write above it, and what that is of */
  open(title, shown) {
    this.shown = shown.map(({ id, head, what = "" }, i) => {
      const text = make("div", { className: "text" });
      const how = make("p", { className: "how dim" });
      const button = make("button", { type: "button", className: "small", textContent: "Go on with this" });
      button.setAttribute("aria-label", `go on with ${what}${head}`);
      button.addEventListener("click", () => this.take(id));
      const card = make("article", { className: "card", tabIndex: i ? -1 : 0 }, make("h3", { textContent: head }), text,
        how, button);
      card.setAttribute("aria-label", `${what}${head}`);
      card.dataset.id = id;
      return { id, card, text, how };
    });
    this.title.textContent = title;
    this.cards.replaceChildren(...this.shown.map(({ card }) => card));
    this.box.hidden = false;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.box.scrollIntoView({ block: "nearest", behavior: still ? "auto" : "smooth" });
  }

  /** tree · here: the node whose text is shown above */
  draw(tree, here, colour, isWriting) {
    if (this.box.hidden) return;
    for (const { id, card, text, how } of this.shown) {
      const node = tree.nodes[id];
      if (!node) continue;
      drawPieces(text, piecesOf(tree, id).filter(piece => piece.start >= node.keep), colour);
      const writing = isWriting(id), stands = { stopped: ", stopped", broken: ", broken off" }[node.finish] ?? "";
      how.textContent = `${counted(node.tokens.length)}${writing ? " …" : stands}`;
      how.title = node.asked ? `seed ${node.asked.seed}` : "";
      card.classList.toggle("writing", writing);
      card.classList.toggle("here", id === here);
    }
  }

  key(event) {
    const cards = [...this.cards.children], at = cards.indexOf(event.target.closest(".card"));
    const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: cards.length - 1 };
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key in moves) this.focus(moves[event.key]);
    else if (/^[1-8]$/.test(event.key) && cards[event.key - 1]) this.take(cards[event.key - 1].dataset.id);
    else if (event.key === "Enter" && event.target.classList.contains("card")) this.take(event.target.dataset.id);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  focus(at = 0) {
    const card = this.cards.children[Math.max(0, Math.min(this.cards.children.length - 1, at))];
    for (const other of this.cards.children) other.tabIndex = other === card ? 0 : -1;
    card?.focus();
  }

  close() {
    if (this.box.hidden) return;
    this.box.hidden = true;
    this.closed();
  }
}
