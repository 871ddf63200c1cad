// The text: a field to write in, over the same text drawn as tokens, whose colours shine through.
//
// What the field shows is as long as the text itself, so that places in the one are places in the other: a carriage
// return, which fields don't keep, is shown as its sign.

const shownAs = text => text.replaceAll("\r", "␍");
const MOST_BITS = 16;

/** How strongly a token is coloured, from 0 to 1, and in which of the two colours. */
export function heatOf(logprob, colour) {
  if (colour === "off" || logprob === undefined || logprob === null) return 0;
  const bits = -logprob / Math.LN2;
  return colour === "surprisal" ? Math.min(1, bits / MOST_BITS) : Math.exp(logprob);
}

/** Draw pieces as spans; those that are there already, and say the same, stay. */
export function drawPieces(into, pieces, colour) {
  into.classList.toggle("cool", colour === "probability");
  pieces.forEach((piece, i) => {
    const key = `${piece.id ?? ""} ${piece.logprob ?? ""} ${piece.text}`;
    let span = into.children[i];
    if (!span) into.append(span = make("span"));
    if (span.dataset.key !== key) {
      span.dataset.key = key;
      span.className = piece.id === undefined ? "plain" : "token";
      span.textContent = shownAs(piece.text);
      span.dataset.at = i;
    }
    const heat = heatOf(piece.logprob, colour).toFixed(3);
    if (span.dataset.heat !== heat) {
      span.dataset.heat = heat;
      span.style.setProperty("--heat", heat);
    }
  });
  while (into.children.length > pieces.length) into.lastChild.remove();
}

export class Editor {
  /**
   * field: the textarea · behind: what is drawn under it
   * on: edit(keep, text), somebody changed what follows the first `keep` characters · place(at), the caret moved ·
   * point(at, span) and leave(), for the pointer and tokens · tap(at, span), for a finger
   */
  constructor(field, behind, on) {
    Object.assign(this, { field, behind, on, text: "", pieces: [], colour: "off", composing: false, waiting: null });
    field.addEventListener("input", () => this.edited());
    field.addEventListener("compositionstart", () => { this.composing = true; });
    field.addEventListener("compositionend", () => {
      this.composing = false;
      this.edited();
      if (this.waiting) this.show(...this.waiting);
    });
    document.addEventListener("selectionchange", () => {
      if (document.activeElement === field) on.place(this.caret());
    });
    field.addEventListener("pointermove", event => {
      if (event.buttons || event.pointerType === "touch") return;
      this.pointed(this.spanUnder(event));
    });
    field.addEventListener("pointerleave", () => this.pointed(null));
    field.addEventListener("pointerup", event => {
      const span = event.pointerType === "touch" ? this.spanUnder(event) : null;
      if (span) setTimeout(() => { if (field.selectionStart === field.selectionEnd) on.tap(Number(span.dataset.at), span); });
    });
  }

  pointed(span) {
    if (span === this.under) return;
    this.under = span;
    if (span) this.on.point(Number(span.dataset.at), span);
    else this.on.leave();
  }

  spanUnder(event) {
    return document.elementsFromPoint(event.clientX, event.clientY)
      .find(element => element.parentElement === this.behind && element.className === "token") ?? null;
  }

  /** Where the caret is in the text. */
  caret() {
    return this.field.selectionEnd;
  }

  /** Which piece a place belongs to; as many as there are pieces for the end. */
  pieceAt(place) {
    const at = this.pieces.findIndex(piece => place < piece.start + piece.text.length);
    return at < 0 ? this.pieces.length : at;
  }

  spanOf(at) {
    return this.behind.children[at] ?? null;
  }

  /** Show a text. The caret stays where it is, or at the end if it was there. caret: where it goes instead */
  show(text, pieces, colour, caret = null) {
    if (this.composing) {
      this.waiting = [text, pieces, colour, caret];
      return;
    }
    this.waiting = null;
    const { field } = this, shown = shownAs(text);
    if (field.value !== shown) {
      const { selectionStart: start, selectionEnd: end, scrollTop } = field, atEnd = end === field.value.length;
      field.value = shown;
      field.scrollTop = scrollTop;
      const place = caret ?? (atEnd && start === end ? shown.length : null);
      if (place === null) field.setSelectionRange(Math.min(start, shown.length), Math.min(end, shown.length));
      else field.setSelectionRange(place, place);
    } else if (caret !== null) field.setSelectionRange(caret, caret);
    Object.assign(this, { text, pieces, colour });
    drawPieces(this.behind, pieces, colour);
    this.under = null;
  }

  /** Find out what somebody changed, and tell. */
  edited() {
    if (this.composing) return;
    const before = shownAs(this.text), now = this.field.value;
    if (now === before) return;
    const shorter = Math.min(before.length, now.length);
    let keep = 0, tail = 0;
    while (keep < shorter && before[keep] === now[keep]) keep++;
    if (keep && /[\ud800-\udbff]/.test(now[keep - 1] ?? "")) keep--; // not through a character
    while (tail < shorter - keep && before[before.length - 1 - tail] === now[now.length - 1 - tail]) tail++;
    const changed = now.slice(keep, now.length - tail) + this.text.slice(this.text.length - tail);
    this.on.edit(keep, changed);
  }

  focus(place = null) {
    this.field.focus();
    if (place !== null) this.field.setSelectionRange(place, place);
  }
}
