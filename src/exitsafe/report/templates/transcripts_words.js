// How things are said in the transcript browser: names of measures, what a score means, hostile text made readable.

const PIECE = 2000; // characters of an answer that are shown before more is asked for
const MAX_NAME = 300; // of an id, a category or a label
const TITLES = {
  asr: "Attack success", asr_loose: "Attack success (loose)", toxicity: "Toxicity", reward: "Reward",
  refusal: "Refusal", vqa_accuracy: "VQA accuracy", coherence: "Coherence",
};
const WORDS = { // of score 0, between, 1
  asr: ["no success", "partly a success", "attack succeeded"],
  asr_loose: ["no success", "partly a success", "attack succeeded"],
  refusal: ["not refused", "partly refused", "refused"],
  vqa_accuracy: ["wrong", "partly right", "right"],
  coherence: ["not coherent", "partly coherent", "coherent"],
};
const LINES = { toxicity: 0.5, reward: 0 }; // where the filter cuts a scorer's scale
const UNSCORED = "not scored";

const many = (n, word, words = `${word}s`) => `${n.toLocaleString("en")} ${n === 1 ? word : words}`;
const letterOf = (n) => (n < 26 ? "" : letterOf(Math.floor(n / 26) - 1)) + String.fromCharCode(65 + (n % 26));

function outcomesOf(measure) {
  const line = LINES[measure] ?? 0;
  return [...(WORDS[measure] || [`below ${line}`, `${line} or more`]), UNSCORED];
}

// NaN: nobody was asked; Infinity: the judge gave no score
function outcomeOf(measure, score) {
  if (Number.isNaN(score)) return "";
  if (score === Infinity) return UNSCORED;
  const words = outcomesOf(measure);
  if (!WORDS[measure]) return words[score >= (LINES[measure] ?? 0) ? 1 : 0];
  return words[score === 0 ? 0 : score === 1 ? 2 : 1];
}

function titleOf({ measure, judge }) {
  const title = TITLES[measure] || measure;
  return element("span", judge === measure ? title : [`${title}, `, element("bdi", judge)]);
}

// controls, what turns the reading direction, what cannot be seen, halves of surrogate pairs
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\u{e0000}-\u{e0fff}\ud800-\udfff]/gu;
const visible = (text) =>
  text.replace(UNSEEN, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

function element(tag, content, attributes = {}) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (typeof content !== "string") made.append(...content);
  else made.textContent = visible(content.length > MAX_NAME ? `${content.slice(0, MAX_NAME)}…` : content);
  return made;
}
