// The text: a field to write in, and behind it the colours of its tokens.
//
// Where each token stands is measured in the same text, unseen, set in one piece as the field sets it. What both show
// is as long as the text itself, so that places in one are places in the other: a carriage return, which fields don't
// keep, is shown as its sign.

const shownAs = text => text.replaceAll("\r", "␍");
const MOST_BITS = 16;
// Tokens that are measured anew before the first that changed: a word that grows can go to the next line.
const BEFORE = 40;
// Milliseconds.
const JUST_NOW = 500;

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

/** The colours behind a text: a mark for each token, and for each line that it stands on. */
class Marks {
  constructor(behind) {
    Object.assign(this, { behind, marks: [], pieces: [], colour: "off" });
    Object.assign(this, { text: document.createTextNode(""), layer: make("div", { className: "marks" }) });
    behind.append(this.text, this.layer);
    new ResizeObserver(() => this.draw(this.text.nodeValue, this.pieces, this.colour, 0)).observe(behind);
  }

  /** text: as it is shown · first: from which piece on all is measured anew; by default what changed */
  draw(text, pieces, colour, first = this.firstChange(pieces)) {
    if (this.text.nodeValue !== text) this.text.nodeValue = text;
    const from = first < pieces.length ? Math.max(0, first - BEFORE) : pieces.length;
    const measured = this.measure(pieces, from);
    for (const mark of this.marks.splice(from).flat()) mark.remove();
    const made = measured.map((places, i) => places.map(place => this.mark(place, from + i)));
    this.marks.push(...made);
    this.layer.append(...made.flat());
    Object.assign(this, { pieces, colour });
    this.layer.classList.toggle("cool", colour === "probability");
    this.marks.forEach((marks, i) => {
      const heat = heatOf(pieces[i].logprob, colour).toFixed(3);
      for (const mark of marks) if (mark.dataset.heat !== heat) {
        mark.dataset.heat = heat;
        mark.style.setProperty("--heat", heat);
      }
    });
  }

  firstChange(pieces) {
    const same = (a, b) => a && b && a.id === b.id && a.start === b.start && a.text === b.text;
    const at = pieces.findIndex((piece, i) => !same(piece, this.pieces[i]));
    return at < 0 ? pieces.length : at;
  }

  measure(pieces, from) {
    const range = document.createRange(), origin = this.behind.getBoundingClientRect();
    return pieces.slice(from).map(({ id, start, text }) => {
      if (id === undefined || !text) return [];
      range.setStart(this.text, start);
      range.setEnd(this.text, start + text.length);
      const found = [...range.getClientRects()], wide = found.filter(({ width }) => width > 0.5);
      if (wide.length > 1 && /^\s/.test(text)) wide.shift(); // the space that is left behind at the end of a line
      return (wide.length ? wide : found.slice(0, 1)).map(({ left, top, width, height }) =>
        ({ left: left - origin.left, top: top - origin.top, width: Math.max(width, 5), height }));
    });
  }

  mark({ left, top, width, height }, at) {
    const mark = make("span", { className: "token" });
    mark.dataset.at = at;
    const pixels = { left, top: top - 3, width, height: height + 6 };
    for (const [name, value] of Object.entries(pixels)) mark.style[name] = `${value}px`;
    return mark;
  }

  /** The first mark of a piece. */
  of(at) {
    return this.marks[at]?.[0] ?? null;
  }
}

export class Editor {
  /**
   * field: the textarea · behind: what is drawn under it
   * on: edit(keep, text), somebody changed what follows the first `keep` characters · place(), the caret moved ·
   * point(at, span) and leave(), for the pointer and tokens · tap(at, span), for a finger
   */
  constructor(field, behind, on) {
    Object.assign(this, { field, on, text: "", pieces: [], marks: new Marks(behind) });
    Object.assign(this, { composing: false, waiting: null, tapped: -JUST_NOW });
    field.addEventListener("input", () => this.edited());
    field.addEventListener("compositionstart", () => { this.composing = true; });
    field.addEventListener("compositionend", () => {
      this.composing = false;
      this.edited();
      if (this.waiting) this.show(...this.waiting);
    });
    document.addEventListener("selectionchange", () => {
      // A tap moves the caret as well, and says so a little later.
      if (document.activeElement === field && performance.now() - this.tapped > JUST_NOW) on.place();
    });
    field.addEventListener("pointermove", event => {
      if (event.buttons || event.pointerType === "touch") return;
      this.pointed(this.spanUnder(event));
    });
    field.addEventListener("pointerleave", () => this.pointed(null));
    field.addEventListener("click", event => {
      const tapped = event.pointerType === "touch" && field.selectionStart === field.selectionEnd;
      const span = tapped ? this.spanUnder(event) : null;
      if (!span) return;
      this.tapped = performance.now();
      on.tap(Number(span.dataset.at), span);
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
      .find(element => element.parentElement === this.marks.layer) ?? null;
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
    return this.marks.of(at);
  }

  /** Show a text. The caret stays where it is, or at the end if it was there. caret: where it goes instead */
  show(text, pieces, colour, caret = null) {
    if (this.composing) {
      this.waiting = [text, pieces, colour, caret];
      return;
    }
    this.waiting = null;
    const { field } = this, shown = shownAs(text), follows = this.seesEnd();
    if (field.value !== shown) {
      const { selectionStart: start, selectionEnd: end, scrollTop } = field, atEnd = end === field.value.length;
      field.value = shown;
      field.scrollTop = scrollTop;
      const place = caret ?? (atEnd && start === end ? shown.length : null);
      if (place === null) field.setSelectionRange(Math.min(start, shown.length), Math.min(end, shown.length));
      else field.setSelectionRange(place, place);
    } else if (caret !== null) field.setSelectionRange(caret, caret);
    Object.assign(this, { text, pieces });
    this.marks.draw(shown, pieces, colour);
    this.under = null;
    if (follows) this.marks.layer.lastElementChild?.scrollIntoView({ block: "nearest" });
  }

  /** Whether the caret stands at the end, and that can be seen: then it is to be seen as well when the text grows. */
  seesEnd() {
    const { field } = this, last = this.marks.layer.lastElementChild;
    if (!last || field.selectionStart !== field.value.length) return false;
    const end = last.getBoundingClientRect().bottom, sheet = field.parentElement.getBoundingClientRect();
    return end <= sheet.bottom + 40 && end <= innerHeight + 40;
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
