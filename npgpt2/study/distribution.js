// What can come at a place of a text, with what each setting of drawing does to it, as figures and as bars: of the
// pages of `npgpt2 inspect` and `npgpt2 serve`. Whoever uses this says what is known of a place:
//
//     likeliest: ids of the tokens that have a bar, from the likeliest on · logits: of these, and of some that follow
//     groups, sizes: of the others, in groups of neighbours in rank, their mean logits, and how many tokens are in each
//     before: ids of the text up to here · own: [id, logit, entry] of tokens that a processor may concern, each once:
//     those of the text among them; entry: where it stands in logits, or behind those, the group that it is in
//     ends: ids of the tokens that end a text

// ---- Making elements. Text only ever enters as text, never as markup.

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// ---- Numbers and tokens as text

const number = value => value.toLocaleString("en");
const hex = byte => byte.toString(16).padStart(2, "0");

function percent(p) {
  const hundredths = 100 * p;
  if (p === 0 || hundredths >= 99.995) return `${Math.round(hundredths)} %`;
  return `${hundredths >= 1 ? hundredths.toFixed(2) : hundredths.toPrecision(3)} %`;
}

/** Attention weights are rounded, so that more digits would say nothing. */
const share = weight => `${(100 * weight).toFixed(1)} %`;

const bytesFrom = characters => Uint8Array.from(characters, character => character.charCodeAt(0));

/**
 * What a token says; bytes that are no text by themselves, as pieces of a character, in hexadecimal.
 * characters: the token's bytes, each as the character of this number
 */
function textFrom(characters) {
  const bytes = bytesFrom(characters);
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return [...bytes].map(byte => `\\x${hex(byte)}`).join("");
  }
}

const SIGNS = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
const codeOf = sign => `\\u${sign.codePointAt(0).toString(16).padStart(4, "0")}`;
const visible = text => text.replace(/[\s\p{C}]/gu, sign => SIGNS[sign] ?? codeOf(sign));
const labelOf = characters => visible(textFrom(characters));

// The sliders, where they change nothing.
const OFF = {
  "repetition-penalty": 1, "no-repeat-ngram-size": 0, "temperature": 1, "top-k": 0, "top-p": 1, "min-p": 0,
  "typical-p": 1,
};

/** The tokens behind the last n - 1, wherever those stand in the text so far. */
function repeats(ids, n) {
  const found = new Set();
  for (let s = n - 1; n && s < ids.length; s++) {
    let back = 1;
    while (back < n && ids[s - back] === ids[ids.length - back]) back++;
    if (back === n) found.add(ids[s]);
  }
  return found;
}

/**
 * What can come at a place, from the likeliest on, as the processors in npgpt2/samplers.py leave it.
 * The likeliest tokens have an entry each, of size 1, of which the first have a bar, by `rank`; the others come in
 * groups, each of `size` tokens that count as equal. What a processor concerns leaves its group.
 */
function candidates(place, settings, banned) {
  const penalty = settings["repetition-penalty"], bias = settings["logit-bias"] ?? {};
  const exact = place.logits.length, seen = new Set(place.before);
  const sizes = [...new Array(exact).fill(1), ...place.sizes];
  const entries = [...place.logits, ...place.groups].map((logit, rank) => ({ logit, rank, size: sizes[rank] }));
  const concerned = id => id in bias || banned.has(id) || (penalty !== OFF["repetition-penalty"] && seen.has(id));
  for (const [id, own, at] of place.own.filter(([id]) => concerned(id))) {
    let entry = entries[at];
    if (at >= exact) {
      entry.size -= 1;
      entry.logit += (entry.logit - own) / Math.max(1, entry.size);
      entries.push(entry = { size: 1 });
    }
    const logit = own + (bias[id] ?? 0);
    entry.logit = !seen.has(id) ? logit : logit < 0 ? logit * penalty : logit / penalty;
    if (banned.has(id)) entry.size = 0;
  }
  return entries.filter(entry => entry.size).sort((one, other) => other.logit - one.logit);
}

/**
 * What can be drawn at a place, as samplers.py says: what `candidates` leaves, narrowed by the filters.
 * settings: as OFF has them, and maybe logit-bias, by id, and min-tokens · p: of each bar · changes: what each setting
 * that is on does, in words.
 */
function drawnFrom(place, settings) {
  const temperature = settings["temperature"];
  const banned = repeats(place.before, settings["no-repeat-ngram-size"]);
  if (settings["min-tokens"]) place.ends.forEach(id => banned.add(id));
  const entries = candidates(place, settings, banned);
  const value = entries.map(entry => entry.logit), kept = entries.map(entry => entry.size);
  const total = weight => kept.reduce((sum, size, i) => sum + size * weight[i], 0);
  const tokens = () => kept.reduce((sum, size) => sum + size, 0);
  const score = value.map(logit => temperature ? (logit - value[0]) / temperature : 0);
  const weight = score.map(Math.exp);
  const left = () => ({ tokens: tokens(), mass: total(weight) });

  /**
   * Keep the entries that are the least away until `each` adds up to a goal; of a group as many tokens as it takes.
   * ties: whether those as far away as the last stay too.
   */
  function reach(goal, each, away, ties) {
    const before = [...kept], order = [...kept.keys()].filter(i => kept[i]).sort((i, j) => away[i] - away[j]);
    let last = order[0], sum = 0;
    for (const i of order) {
      if (sum < goal) last = i;
      kept[i] = sum >= goal ? 0 : Math.min(kept[i], Math.max(1, Math.ceil((goal - sum) / each[i])));
      sum += kept[i] * each[i];
    }
    if (ties) away.forEach((far, i) => { if (i !== last && far <= away[last]) kept[i] = before[i]; });
  }

  const rank = value.map(logit => -logit);
  const narrow = {
    "top-k": k => reach(k, kept.map(() => 1), rank, true),
    "top-p": (p, mass) => reach(p, weight.map(w => w / mass), rank, false),
    "min-p": p => weight.forEach((w, i) => { if (w < p) kept[i] = 0; }),  // the likeliest's is 1
    "typical-p": (p, mass) => {
      const surprise = score.map(s => Math.log(mass) - s);
      const expected = weight.reduce((sum, w, i) => kept[i] && w ? sum + kept[i] * w / mass * surprise[i] : sum, 0);
      reach(p, weight.map(w => w / mass), surprise.map(s => Math.abs(s - expected)), true);
    },
  };
  const changes = processed(place, settings);
  if (!temperature) {
    kept.fill(0, 1);
    changes.push("temperature 0 always takes the likeliest");
  }
  for (const [name, cut] of Object.entries(narrow)) {
    if (!temperature || settings[name] === OFF[name]) continue;
    const before = left();
    cut(settings[name], before.mass);
    const after = left(), lost = Math.max(0, 1 - after.mass / before.mass);
    changes.push(`${name} cuts off ${counted(before.tokens - after.tokens)} with ${percent(lost)}`);
  }
  const after = left(), shown = new Array(place.likeliest.length).fill(0);
  let entropy = 0;
  entries.forEach(({ rank }, i) => {
    const p = kept[i] ? weight[i] / after.mass : 0;
    if (rank < shown.length) shown[rank] = p;
    if (p) entropy -= kept[i] * p * Math.log2(p);
  });
  return { p: shown, entropy, changes, tokens: after.tokens };
}

/** What each processor that is on concerns, in words. */
function processed(place, settings) {
  const changes = [], biased = Object.keys(settings["logit-bias"] ?? {}).length;
  if (biased) changes.push(`logit-bias changes ${counted(biased)}`);
  if (settings["repetition-penalty"] !== OFF["repetition-penalty"]) {
    changes.push(`repetition-penalty lowers ${counted(new Set(place.before).size)}`);
  }
  if (settings["no-repeat-ngram-size"]) {
    changes.push(`no-repeat-ngram-size bans ${counted(repeats(place.before, settings["no-repeat-ngram-size"]).size)}`);
  }
  if (settings["min-tokens"]) changes.push(`min-tokens bans ${counted(place.ends.length)}`);
  return changes;
}

const counted = n => `${number(n)} token${n === 1 ? "" : "s"}`;

function bar(name, title, length, ghost, scale, text) {
  const track = make("span", { className: "track" });
  for (const [kind, size] of [["bar", length], ["ghost", ghost]]) {
    if (!size) continue;
    const drawn = make("span", { className: kind });
    drawn.style.width = `${100 * size / scale}%`;
    track.append(drawn);
  }
  return make("li", {}, make("span", { className: "label mono", textContent: name, title }), track,
    make("span", { className: "value", textContent: text }));
}

/**
 * Draw what can come at a place: outlines before the settings, bars after them.
 * label: makes text of an id · vocabulary: how many tokens there are · actual: the id of what does come, if it is known
 * into: the elements for the bars, the summary, and what stands below.
 */
function drawDistribution(place, settings, label, vocabulary, actual, into) {
  const own = drawnFrom(place, OFF), now = drawnFrom(place, settings);
  const scale = Math.max(own.p[0], ...now.p);
  into.bars.replaceChildren(...[...place.likeliest].map((id, i) => {
    const name = label(id), text = now.p[i] ? percent(now.p[i]) : "cut off";
    const row = bar(name, `${name}, id ${id}`, now.p[i], own.p[i], scale, text);
    row.classList.toggle("cut", !now.p[i]);
    row.classList.toggle("actual", id === actual);
    return row;
  }));
  const entropy = make("b", { textContent: `${now.entropy.toFixed(3)} bits` });
  const equals = (2 ** now.entropy).toFixed(1);
  const choice = now.entropy ? `as much as a choice among ${equals} equally likely tokens` : "no choice";
  const left = `${number(now.tokens)} of ${number(vocabulary)} can come`;
  into.summary.replaceChildren("entropy ", entropy, [`, ${choice}`, left, ...now.changes].join(" · "));
  const others = now.tokens - now.p.filter(p => p).length;
  into.rest.textContent = others > 0
    ? `and ${counted(others)} with ${percent(Math.max(0, 1 - now.p.reduce((sum, p) => sum + p, 0)))} together` : "";
}
