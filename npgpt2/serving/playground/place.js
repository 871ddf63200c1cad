// A place of the text: what could come there, before and after the settings, as bars and as choices.

import { fitting, placeAfter } from "./api.js";
import { forDistribution } from "./settings.js";

const KEPT = 100, CHOICES = 10;

export class Places {
  /** settings: gives the settings' values · window: how many tokens the model reads */
  constructor(settings, window) {
    Object.assign(this, { settings, window, known: new Map() });
  }

  /** What comes before a piece: token ids where all are known, or else its text. */
  async promptBefore(pieces, signal) {
    const ids = pieces.map(piece => piece.id);
    if (ids.every(id => id !== undefined)) return ids.length ? ids.slice(-this.window()) : "";
    const text = pieces.map(piece => piece.text).join("");
    const { from } = await fitting(text, 0, signal);
    return text.slice(from);
  }

  /** What can come behind pieces, as distribution.js takes it. */
  async after(pieces, signal) {
    const prompt = await this.promptBefore(pieces, signal), { logit_bias: bias } = this.settings();
    const key = JSON.stringify([prompt, Object.keys(bias)]);
    let place = this.known.get(key);
    if (!place) {
      place = await placeAfter({ prompt, logit_bias: bias }, signal);
      place.label = id => labelOf(place.texts[id]);
      place.settings = null;
    }
    this.known.delete(key);
    this.known.set(key, place); // the last that was asked for is forgotten last
    if (this.known.size > KEPT) this.known.delete(this.known.keys().next().value);
    return place;
  }

  forget() {
    this.known.clear();
  }

  /** The likeliest of a place: id, label, text, null where it is no whole character, before and after the settings. */
  choices(place) {
    const before = drawnFrom(place, OFF), after = drawnFrom(place, forDistribution(this.settings()));
    return [...place.likeliest].slice(0, CHOICES).map((id, i) => ({
      id, label: place.label(id), text: wholeText(place.texts[id]), before: before.p[i], after: after.p[i],
    }));
  }

  draw(place, actual, into) {
    drawDistribution(place, forDistribution(this.settings()), place.label, place.vocabulary, actual, into);
  }
}

function wholeText(characters) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytesFrom(characters));
  } catch {
    return null;
  }
}

const bitsOf = logprob => `${(-logprob / Math.LN2).toFixed(2)} bits`;

/** The little window beside a token, with what else could have come there. */
export class Choices {
  /** box: the element · choose(at, choice): somebody chose · back(): give the keyboard back to the text */
  constructor(box, choose, back) {
    Object.assign(this, { box, choose, back, at: null });
    box.addEventListener("keydown", event => this.key(event));
    box.addEventListener("pointerenter", () => clearTimeout(this.leaving));
    box.addEventListener("pointerleave", () => this.leave());
  }

  get open() {
    return !this.box.hidden;
  }

  /** Show it for a piece. span: where on the page · known: choices, or null until they are there */
  show(at, piece, span, known) {
    clearTimeout(this.leaving);
    const had = this.box.contains(document.activeElement) ? [...this.box.querySelectorAll("button")]
      .indexOf(document.activeElement) : null;
    this.at = at;
    const { box } = this, what = piece ? shownLabel(piece.text) : "next";
    const head = make("p", { className: "what" }, make("b", { className: "label mono", textContent: what }));
    if (piece?.logprob !== undefined && piece?.logprob !== null) {
      head.append(make("span", { textContent: `${percent(Math.exp(piece.logprob))} · ${bitsOf(piece.logprob)}` }));
    } else if (piece) head.append(make("span", { textContent: at ? "not known yet" : "nothing came before it" }));
    const list = known?.map(choice => this.row(at, piece, choice));
    const names = make("p", { className: "names dim" }, make("span", { textContent: "the model’s own" }),
      make("span", { textContent: "after the settings" }));
    const rows = list ? [names, ...list] : [make("p", { className: "dim", textContent: "asking …" })];
    box.replaceChildren(head, ...rows);
    box.hidden = false;
    this.put(span);
    if (had !== null) (box.querySelectorAll("button")[had] ?? box).focus();
  }

  row(at, piece, choice) {
    const { id, label, text, before, after } = choice;
    const drawn = after === undefined ? "…" : after ? percent(after) : "cut off";
    const row = make("button", { type: "button", className: "choice", tabIndex: -1 },
      make("span", { className: "label mono", textContent: label }),
      make("span", { className: "value before", textContent: percent(before) }),
      make("span", { className: "value after", textContent: drawn }));
    row.style.setProperty("--share", before);
    row.dataset.id = id;
    row.classList.toggle("actual", piece?.id === id);
    row.classList.toggle("cut", after === 0);
    row.disabled = text === null;
    if (text === null) row.title = "only a part of a character, which can't be put in by itself";
    row.addEventListener("click", () => this.choose(at, choice));
    return row;
  }

  /** Below the token, or above it where there is no room; never beyond the page. */
  put(span) {
    const { box } = this, place = span.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = box, wide = document.documentElement.clientWidth;
    const below = place.bottom + 6, above = place.top - height - 6;
    const top = below + height <= innerHeight || above < 0 ? below : above;
    box.style.left = `${scrollX + Math.max(6, Math.min(place.left, wide - width - 6))}px`;
    box.style.top = `${scrollY + top}px`;
  }

  focus() {
    (this.box.querySelector("button.actual:enabled") ?? this.box.querySelector("button:enabled"))?.focus();
  }

  key(event) {
    const rows = [...this.box.querySelectorAll("button:enabled")], at = rows.indexOf(document.activeElement);
    const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 };
    if (event.key in moves) rows[(moves[event.key] + rows.length) % rows.length]?.focus();
    else if (event.key === "Tab") this.close(true);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** The pointer left: close in a moment, unless it comes back or the keyboard is here. */
  leave() {
    clearTimeout(this.leaving);
    this.leaving = setTimeout(() => {
      if (!this.box.matches(":hover") && !this.box.contains(document.activeElement)) this.close();
    }, 250);
  }

  close(byKeyboard = false) {
    clearTimeout(this.leaving);
    if (!this.open) return;
    const had = this.box.contains(document.activeElement);
    this.box.hidden = true;
    this.at = null;
    if (had || byKeyboard) this.back();
  }
}

const shownLabel = text => visible(text) || "part of a character";
