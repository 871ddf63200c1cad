// What a text is written with: the sliders and fields, and the request that they make.

import { lasting } from "./storage.js";

// By the names of the requests. least, most: of the slider; from, to: of what may be typed, where that is more.
export const SAMPLERS = {
  max_tokens: { label: "length", least: 1, most: 256, to: 4096, step: 1, value: 64, off: null, says: "tokens at most" },
  temperature: { label: "temperature", least: 0, most: 3, to: 100, step: 0.05, value: 0.7, off: 1,
    says: "below 1 plays safe, above 1 takes risks; 0 always takes the likeliest" },
  top_k: { label: "top-k", least: 0, most: 200, to: 100000, step: 1, value: 0, off: 0, says: "only the k likeliest" },
  top_p: { label: "top-p", least: 0.01, most: 1, step: 0.01, value: 1, off: 1,
    says: "only the fewest whose probabilities reach p" },
  min_p: { label: "min-p", least: 0, most: 0.5, to: 1, step: 0.005, value: 0, off: 0,
    says: "only those at least p times as likely as the likeliest" },
  typical_p: { label: "typical-p", least: 0.01, most: 1, step: 0.01, value: 1, off: 1,
    says: "only the least atypical whose probabilities reach p" },
  repetition_penalty: { label: "repetition penalty", least: 1, most: 2, from: 0.01, to: 100, step: 0.05, value: 1,
    off: 1, says: "above 1, what the text has is less likely to come again" },
  presence_penalty: { label: "presence penalty", least: -2, most: 2, step: 0.05, value: 0, off: 0,
    says: "the same for what was written since you pressed Write" },
  frequency_penalty: { label: "frequency penalty", least: -2, most: 2, step: 0.05, value: 0, off: 0,
    says: "the same, for each time that it was" },
  no_repeat_ngram_size: { label: "n-gram ban", least: 0, most: 10, to: 1000, step: 1, value: 0, off: 0,
    says: "never the same n tokens in a row twice" },
  min_tokens: { label: "min tokens", least: 0, most: 100, to: 4096, step: 1, value: 0, off: 0,
    says: "the model can't end the text before" },
};
const FIRST = ["max_tokens", "temperature", "top_k", "top_p"];
const DEFAULTS = Object.fromEntries(Object.entries(SAMPLERS).map(([name, { value }]) => [name, value]));
const OTHERS = { stop: [], logit_bias: {}, ignore_eos: false };
const STORED = "npgpt2.settings";

const isNumber = (value, { least, most, from = least, to = most, step }) => typeof value === "number"
  && value >= from && value <= to && (step !== 1 || Number.isInteger(value));

/** Settings from a file or from storage, with nothing in them but what we know; what is wrong is left out. */
export function parseSettings(said) {
  const found = {};
  if (!said || typeof said !== "object") return found;
  for (const [name, sampler] of Object.entries(SAMPLERS)) if (isNumber(said[name], sampler)) found[name] = said[name];
  const texts = Array.isArray(said.stop) && said.stop.length <= 32
    && said.stop.every(text => typeof text === "string" && text && text.length <= 200);
  if (texts) found.stop = [...said.stop];
  if (said.logit_bias && typeof said.logit_bias === "object") {
    const fits = ([id, bias]) => /^\d{1,9}$/.test(id) && typeof bias === "number" && Math.abs(bias) <= 100;
    found.logit_bias = Object.fromEntries(Object.entries(said.logit_bias).filter(fits).slice(0, 1000));
  }
  if (typeof said.ignore_eos === "boolean") found.ignore_eos = said.ignore_eos;
  return found;
}

/** A request as a node keeps it: settings, its seed, and what was read. Undefined where that isn't all there. */
export function parseAsked(said) {
  const settings = parseSettings(said), { seed, from, model } = said ?? {};
  const whole = value => Number.isSafeInteger(value) && value >= 0;
  if (!("max_tokens" in settings && "temperature" in settings && whole(seed) && whole(from))) return undefined;
  const name = typeof model === "string" ? model.slice(0, 500) : "";
  return { ...DEFAULTS, ...OTHERS, ...settings, seed, from, model: name };
}

/** A request's body for the server, with what is off left out. */
export function bodyOf(asked, prompt) {
  const { from: _, stop, logit_bias: biases, ignore_eos: ignore, ...rest } = asked;
  const body = { model: asked.model, prompt };
  for (const [name, value] of Object.entries(rest)) if (SAMPLERS[name]?.off !== value) body[name] = value;
  if (stop.length) body.stop = stop;
  if (Object.keys(biases).length) body.logit_bias = biases;
  if (ignore) body.ignore_eos = true;
  return body;
}

/** As distribution.js takes them. */
export const forDistribution = ({ logit_bias: bias, ...settings }) => ({
  ...Object.fromEntries(Object.entries(settings).map(([name, value]) => [name.replaceAll("_", "-"), value])),
  "logit-bias": bias,
});

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

// ---- As one writes them: escapes in stop strings, ID=BIAS in biases

const ESCAPES = { "\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\" };
const readStops = text => text.split("\n").filter(Boolean)
  .map(line => line.replace(/\\[ntr\\]/g, escape => ESCAPES[escape]));
const showStops = stops => stops.map(stop => stop.replace(/[\n\t\r\\]/g,
  sign => Object.keys(ESCAPES).find(escape => ESCAPES[escape] === sign))).join("\n");
const showBiases = biases => Object.entries(biases).map(([id, bias]) => `${id}=${bias}`).join(", ");

function readBiases(text) {
  const pairs = text.split(/[\s,]+/).filter(Boolean).map(pair => pair.match(/^(\d{1,9})=(-?\d+(?:\.\d+)?)$/));
  return pairs.every(pair => pair && Math.abs(pair[2]) <= 100)
    ? Object.fromEntries(pairs.map(([, id, bias]) => [id, Number(bias)])) : null;
}

// ---- The panel

export class Settings {
  /** into: where the rows go, {first, more} · fields: {stop, bias, ends, seed, fixed} · onChange: called afterwards */
  constructor(into, fields, onChange) {
    Object.assign(this, { fields, onChange, values: { ...DEFAULTS, ...OTHERS }, rows: {} });
    for (const [name, sampler] of Object.entries(SAMPLERS)) this.addRow(name, sampler, into);
    this.set(parseSettings(lasting.json(STORED)), false);
    fields.stop.addEventListener("input", () => this.set({ stop: readStops(fields.stop.value) }, true, fields.stop));
    fields.ends.addEventListener("input", () => this.set({ ignore_eos: fields.ends.checked }));
    fields.bias.addEventListener("input", () => {
      const read = readBiases(fields.bias.value);
      fields.bias.setCustomValidity(read ? "" : "Write ID=BIAS, as in 265=-5, with a bias from -100 to 100.");
      fields.bias.toggleAttribute("aria-invalid", !read);
      if (read) this.set({ logit_bias: read }, true, fields.bias);
    });
    fields.seed.addEventListener("input", () => { fields.fixed.checked = fields.seed.value !== ""; });
  }

  addRow(name, sampler, into) {
    const { label, least, most, from = least, to = most, step, says } = sampler;
    const field = (type, [min, max], more) => make("input", { type, min, max, step, id: `${type}-${name}`, ...more });
    const range = field("range", [least, most], { title: says });
    const typed = field("number", [from, to], { step: step === 1 ? 1 : "any" });
    typed.setAttribute("aria-label", `${label}, as a number`);
    const row = make("div", { className: "row" }, make("label", { htmlFor: range.id, textContent: label, title: says }),
      typed, range);
    const changed = element => () => {
      const value = element.value === "" ? NaN : Number(element.value);
      const fits = isNumber(value, sampler);
      typed.toggleAttribute("aria-invalid", !fits);
      if (fits) this.set({ [name]: value }, true, element);
    };
    range.addEventListener("input", changed(range));
    typed.addEventListener("input", changed(typed));
    typed.addEventListener("blur", () => this.draw());
    range.setAttribute("aria-description", says);
    this.rows[name] = { row, range, typed };
    (FIRST.includes(name) ? into.first : into.more).append(row);
  }

  /** Take over some settings. from: the element that somebody is just using, which is left as it is */
  set(values, tell = true, from = null) {
    Object.assign(this.values, values);
    lasting.set(STORED, JSON.stringify(this.values));
    this.draw(from);
    if (tell) this.onChange();
  }

  reset() {
    for (const { typed } of Object.values(this.rows)) typed.removeAttribute("aria-invalid");
    this.set({ ...DEFAULTS, ...structuredClone(OTHERS) });
  }

  draw(from = null) {
    const { fields, values } = this;
    for (const [name, { row, range, typed }] of Object.entries(this.rows)) {
      const value = values[name];
      row.classList.toggle("off", value === SAMPLERS[name].off);
      range.setAttribute("aria-valuetext", value === SAMPLERS[name].off && name !== "temperature" ? "off" : value);
      if (range !== from) range.value = value;
      if (typed !== from) typed.value = value;
      typed.toggleAttribute("aria-invalid", false);
    }
    if (fields.stop !== from) fields.stop.value = showStops(values.stop);
    if (fields.bias !== from) fields.bias.value = showBiases(values.logit_bias);
    fields.ends.checked = values.ignore_eos;
  }

  /** What a request asks for, but for its prompt. from: where in the text that begins */
  asked(model, from, more = {}) {
    return { ...structuredClone(this.values), ...more, seed: more.seed ?? this.seed(), from, model };
  }

  /** The seed that is fixed, or a new one, which is shown so that it can be used again. */
  seed() {
    const { seed, fixed } = this.fields, typed = Number(seed.value);
    const fits = seed.value !== "" && Number.isSafeInteger(typed) && typed >= 0;
    if (!(fixed.checked && fits)) seed.value = randomSeed();
    return Number(seed.value);
  }
}
