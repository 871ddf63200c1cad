// The request behind a text as commands for elsewhere, each of which gives the same text.
//
// Whatever a text holds, and whoever wrote the tree that it is from, its words stay words: in JSON, in Python's strings
// and in the shell's. Control characters, and those that turn the direction of text, never stand in a command.

import { bodyOf, SAMPLERS } from "./settings.js";

const UNSEEN = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\p{Co}]/gu, HAS_UNSEEN = new RegExp(UNSEEN.source, "u");
const hexOf = (value, digits) => value.toString(16).padStart(digits, "0");
const utf16 = text => [...Array(text.length).keys()].map(i => `\\u${hexOf(text.charCodeAt(i), 4)}`).join("");

/** JSON in which no sign ends a shell's quotes, and nothing is unseen. */
export const plainJSON = value => JSON.stringify(value).replace(UNSEEN, utf16).replaceAll("'", "\\u0027");

const utf8 = text => [...new TextEncoder().encode(text)];
const octal = sign => utf8(sign).map(byte => `\\${byte.toString(8).padStart(3, "0")}`).join("");

/** A word for bash and zsh, which is the text to the last byte. It can't have a zero byte, which no word can. */
export function quoted(text) {
  if (/^[\w./:-][\w./:=-]*$/.test(text)) return text;
  if (!HAS_UNSEEN.test(text)) return `'${text.replaceAll("'", "'\\''")}'`;
  const escaped = text.replace(/['\\]/g, sign => `\\${sign}`).replaceAll("!", "\\041").replaceAll("\n", "\\n");
  return `$'${escaped.replace(UNSEEN, octal)}'`;
}

/** What prints a text and a line feed, whatever is in it. */
const printing = text => `printf '${text.replace(/['\\]/g, octal).replaceAll("%", "%%").replace(UNSEEN, octal)}\\n'`;

/** A literal of Python. */
function python(value) {
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(pair => pair.map(python).join(": ")).join(", ")}}`;
  }
  if (typeof value === "number") return JSON.stringify(value);
  const escape = sign => `\\U${hexOf(sign.codePointAt(0), 8)}`;
  return JSON.stringify(value).replace(UNSEEN, escape);
}

/** Of a request: the address, what it says, and the key's place if one is needed. */
export function asCurl(asked, prompt, { base, key }) {
  const lines = [`curl -s ${quoted(`${base}v1/completions`)}`, "-H 'Content-Type: application/json'"];
  if (key) lines.push('-H "Authorization: Bearer $NPGPT2_API_KEY"');
  return [...lines, `-d '${plainJSON(bodyOf(asked, prompt))}'`].join(" \\\n  ");
}

const OPENAI = ["model", "prompt", "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty",
  "stop", "logit_bias", "seed"];

export function asPython(asked, prompt, { base, key }) {
  const body = Object.entries(bodyOf(asked, prompt));
  const given = body.filter(([name]) => OPENAI.includes(name)).map(([name, value]) => `${name}=${python(value)}`);
  const others = Object.fromEntries(body.filter(([name]) => !OPENAI.includes(name)));
  if (Object.keys(others).length) given.push(`extra_body=${python(others)}`);
  return [
    ...(key ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${python(`${base}v1`)}, api_key=${key ? 'os.environ["NPGPT2_API_KEY"]' : '"none"'})`,
    "completion = client.completions.create(",
    ...given.map(argument => `    ${argument},`),
    ")",
    "print(completion.choices[0].text)",
  ].join("\n");
}

export function asCommand(asked, prompt) {
  const words = ["npgpt2 generate", `-m ${quoted(asked.model)}`, "--allow-special"];
  for (const name of Object.keys(SAMPLERS)) {
    const option = name === "max_tokens" ? "--length" : `--${name.replaceAll("_", "-")}`;
    if (asked[name] !== SAMPLERS[name].off || name === "temperature") words.push(`${option}=${asked[name]}`);
  }
  for (const stop of asked.stop) words.push(`--stop=${quoted(stop)}`);
  for (const [id, bias] of Object.entries(asked.logit_bias)) words.push(`--logit-bias=${id}=${bias}`);
  if (asked.ignore_eos) words.push("--ignore-eot");
  words.push(`--seed=${asked.seed}`);
  return prompt.includes("\0") ? `${printing(prompt)} | ${words.join(" ")}` : `${words.join(" ")} -- ${quoted(prompt)}`;
}

export const WAYS = { curl: asCurl, "Python (openai)": asPython, "npgpt2 generate": asCommand };
