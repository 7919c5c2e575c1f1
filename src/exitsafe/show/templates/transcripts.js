// The transcript browser: filters, a list of samples, one sample's answers side by side.
// What comes from a model, a judge or a data set is shown with textContent only. It makes no requests.

// ---- words: what a score means, hostile text made readable ----

const PIECE = 2000; // characters of an answer that are shown before more is asked for
const MAX_NAME = 300; // of an id, a category or a label
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

function titleOf({ title, measure, judge }) {
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

// ---- data: columns over (sample, exit layer), packed by transcripts.py, unpacked on demand ----
// A part is either in the page or in a sidecar file that the reader has opened.

const data = JSON.parse(document.getElementById("transcripts-data").textContent);
const numLayers = data.exitLayers.length;
const asJson = (buffer) => JSON.parse(new TextDecoder().decode(buffer));
const asBytes = (buffer) => new Uint8Array(buffer);
const asCounts = (buffer) => new Uint32Array(buffer);
const READERS = {
  ids: asJson, labels: asJson, kinds: asBytes, finish: asBytes, hashes: asBytes, categories: asCounts,
  tokens: asCounts, chars: asCounts, codes: asCounts, scores: (buffer) => new Float32Array(buffer),
};
const unpacked = new Map();
let sidecar = null;

// `scores0.2`: of run 0 and its third judge's measure
function column(name) {
  if (!unpacked.has(name)) {
    const read = READERS[name.match(/^[a-z]+/)[0]];
    unpacked.set(name, unpack(data.columns[name]).then(read));
  }
  return unpacked.get(name);
}

const columns = (names) => Promise.all(names.map(column));

// [run][layer]; null where the texts are not at hand
async function textsOf(sample) {
  const isAtHand = data.texts.length && (typeof data.texts[sample] === "string" || sidecar);
  return isAtHand ? asJson(await unpack(data.texts[sample])) : null;
}

const hasColumns = () => typeof data.columns.ids === "string" || sidecar !== null;

async function unpack(where) {
  const base64 = typeof where === "string" ? where : await sidecar.slice(where[0], where[0] + where[1]).text();
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
}

// whether the file is this report's
async function takeSidecar(file) {
  const heading = (await file.slice(0, 200).text()).split("\n")[0];
  if (heading !== data.sidecar.heading || file.size !== data.sidecar.bytes) return false;
  sidecar = file;
  return true;
}

// ---- state ----

const PAGE = 20; // samples in the list at a time
const HASH_BYTES = 6;
const $ = (id) => document.getElementById(id);
const measures = []; // of any run: judge, measure, and its place among the verdicts of each run
const state = { matches: [], counts: [], page: 0, open: -1, asked: 0, isMatch: null };

// ---- filters ----

data.runs.forEach((run, r) => run.verdicts.forEach(({ judge, measure, title }, v) => {
  let known = measures.find((other) => other.judge === judge && other.measure === measure);
  if (!known) measures.push((known = { judge, measure, title, place: [] }));
  known.place[r] = v;
}));

function fill(select, every, options) {
  select.replaceChildren(element("option", every, { value: "" }));
  options.forEach(([value, text]) => select.append(element("option", text, { value })));
}

async function fillFilters() {
  fill($("t-kind"), "all kinds", data.kinds.map((kind, k) => [k, kind]));
  fill($("t-category"), "all categories", data.categories.map((category, c) => [c, category || "(none)"]));
  fill($("t-run"), "any run", data.runs.map((run, r) => [r, run.label]));
  const named = (layer) => (layer === data.defaultExit ? `${layer} (default)` : `${layer}`);
  fill($("t-layer"), "any layer", data.exitLayers.map((layer, l) => [l, named(layer)]));
  for (const [m, measure] of measures.entries()) {
    const labels = await labelsOf(measure);
    measure.saysMore = labels.length > 2; // than its score does
    const select = element("select", [], { id: `t-verdict-${m}` });
    const ofLabels = measure.saysMore && labels.length <= 60 ? labels.map((label) => [`l${label}`, `label: ${label}`]) : [];
    fill(select, "any verdict", [...outcomesOf(measure.measure).map((word) => [`o${word}`, word]), ...ofLabels]);
    $("t-verdicts").append(element("label", [titleOf(measure), select]));
  }
}

async function labelsOf({ place }) {
  const names = data.runs.flatMap((_, r) => (place[r] === undefined ? [] : [`labels${r}.${place[r]}`]));
  return [...new Set((await columns(names)).flat())].filter(Boolean).sort();
}

const chosen = (id) => ($(id).value === "" ? -1 : Number($(id).value));

// functions that say whether the answer in a cell of this run has a verdict that was asked for
async function verdictTests(r) {
  const tests = [];
  for (const [m, { measure, place }] of measures.entries()) {
    const [way, word] = [$(`t-verdict-${m}`).value.slice(0, 1), $(`t-verdict-${m}`).value.slice(1)];
    if (way === "") continue;
    if (place[r] === undefined) {
      tests.push(() => false);
    } else if (way === "l") {
      const [labels, codes] = await columns([`labels${r}.${place[r]}`, `codes${r}.${place[r]}`]);
      const code = labels.indexOf(word);
      tests.push((cell) => codes[cell] === code);
    } else {
      const scores = await column(`scores${r}.${place[r]}`);
      tests.push((cell) => outcomeOf(measure, scores[cell]) === word);
    }
  }
  return tests;
}

// per run: whether the answer in a cell meets what is asked of run, layer and verdicts
async function answerTests() {
  const [run, layer] = [chosen("t-run"), chosen("t-layer")];
  return Promise.all(data.runs.map(async (_, r) => {
    if (run !== -1 && run !== r) return () => false;
    const [finish, tests] = [await column(`finish${r}`), await verdictTests(r)];
    return (cell) => finish[cell] > 0 && (layer === -1 || cell % numLayers === layer) && tests.every((test) => test(cell));
  }));
}

async function search() {
  const asked = ++state.asked;
  const [ids, kinds, categories] = await columns(["ids", "kinds", "categories"]);
  const tests = await answerTests();
  if (asked !== state.asked) return; // a later search is under way
  const [kind, category] = [chosen("t-kind"), chosen("t-category")];
  const id = $("t-id").value.trim().toLowerCase();
  const isAsked = (s) =>
    (kind === -1 || kinds[s] === kind) && (category === -1 || categories[s] === category) &&
    (id === "" || ids[s].toLowerCase().includes(id));
  const [matches, counts] = [[], []];
  let total = 0;
  for (let s = 0; s < data.numSamples; s++) {
    if (!isAsked(s)) continue;
    let count = 0;
    for (const test of tests) {
      for (let cell = s * numLayers; cell < (s + 1) * numLayers; cell++) if (test(cell)) count++;
    }
    if (count === 0) continue;
    matches.push(s);
    counts.push(count);
    total += count;
  }
  Object.assign(state, { matches, counts, page: 0, isMatch: (r, s, l) => isAsked(s) && tests[r](s * numLayers + l) });
  $("t-count").textContent = matches.length
    ? `${many(total, "answer")} of ${many(matches.length, "sample")} match.`
    : "No answer matches; clear a filter.";
  await showList();
  if (state.open >= 0) await showSample(state.open);
}

// ---- the list ----

const rowButtons = () => [...$("t-list").querySelectorAll("button")];
// not `disabled`: the button that was just pressed must keep the focus
const setAble = (id, isAble) => $(id).setAttribute("aria-disabled", String(!isAble));
const isAble = (button) => button.getAttribute("aria-disabled") !== "true";

async function showList() {
  const [ids, kinds, categories] = await columns(["ids", "kinds", "categories"]);
  const start = state.page * PAGE;
  const rows = state.matches.slice(start, start + PAGE).map((s, i) => {
    const said = [...groupsOf(kinds[s], categories[s]), `: ${many(state.counts[start + i], "match", "matches")}`];
    const row = element("button", [element("bdi", ids[s]), element("span", said, { class: "t-small" })], {
      type: "button", "data-sample": s,
    });
    if (s === state.open) row.setAttribute("aria-current", "true");
    return element("li", [row]);
  });
  $("t-list").replaceChildren(...rows);
  $("t-list").setAttribute("start", start + 1);
  const pages = Math.max(1, Math.ceil(state.matches.length / PAGE));
  $("t-page").textContent = `Page ${state.page + 1} of ${pages}`;
  setAble("t-back", state.page > 0);
  setAble("t-on", state.page + 1 < pages);
}

function groupsOf(kind, category) {
  const named = data.categories[category];
  return [data.kinds[kind], ...(named ? [", ", element("bdi", named)] : [])];
}

async function turn(pages) {
  state.page += pages;
  await showList();
}

async function onListKey(event) {
  const rows = rowButtons();
  const at = rows.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
  if (to === undefined || at < 0) return;
  event.preventDefault();
  if (to === rows.length && isAble($("t-on"))) {
    await turn(1);
    rowButtons()[0].focus();
  } else if (to === -1 && isAble($("t-back"))) {
    await turn(-1);
    rowButtons().at(-1).focus();
  } else {
    rows[Math.min(Math.max(to, 0), rows.length - 1)].focus();
  }
}

// ---- one sample ----

async function openSample(s) {
  state.open = s;
  state.page = Math.max(0, Math.floor(state.matches.indexOf(s) / PAGE));
  await showList();
  await showSample(s);
  $("t-sample").focus();
}

async function showSample(s) {
  const [ids, kinds, categories] = await columns(["ids", "kinds", "categories"]);
  const [answers, texts] = [await Promise.all(data.runs.map((_, r) => answersOf(r, s))), await textsOf(s)];
  if (s !== state.open) return; // another one was opened meanwhile
  $("t-sample").replaceChildren(element("bdi", ids[s]));
  $("t-about").replaceChildren(...groupsOf(kinds[s], categories[s]));
  const at = state.matches.indexOf(s);
  setAble("t-before", at > 0);
  setAble("t-after", at >= 0 && at + 1 < state.matches.length);
  $("t-tools").hidden = $("t-scroll").hidden = false;
  nameAnswers(answers);
  const caption = "A bar at an answer's left edge means that it matches the filters.";
  const elsewhere = data.hasTexts && !texts ? ` To read the texts, open ${data.sidecar.name} above.` : "";
  const head = [element("th", "Exit layer", { scope: "col" })];
  data.runs.forEach((run) => head.push(element("th", [element("bdi", run.label)], { scope: "col" })));
  const rows = data.exitLayers.flatMap((layer, l) => {
    const isMatch = data.runs.map((_, r) => state.isMatch(r, s, l));
    if ($("t-only").checked && !isMatch.includes(true)) return [];
    const edge = element("th", `${layer}`, { scope: "row" });
    if (layer === data.defaultExit) edge.append(element("span", "default", { class: "t-small" }));
    return [element("tr", [edge, ...answers.map((run, r) => answerCell(run[l], isMatch[r], texts && texts[r][l]))])];
  });
  $("t-scroll").replaceChildren(element("table", [
    element("caption", caption + elsewhere), element("thead", [element("tr", head)]), element("tbody", rows),
  ]));
}

// by layer: what is known of an answer; null where there is none
async function answersOf(r, s) {
  const [finish, tokens, chars, hashes] = await columns(["finish", "tokens", "chars", "hashes"].map((name) => name + r));
  const verdicts = await Promise.all(data.runs[r].verdicts.map(async ({ judge, measure }, v) => {
    const [scores, codes, labels] = await columns(["scores", "codes", "labels"].map((name) => `${name}${r}.${v}`));
    return { scores, codes, labels, ...measures.find((m) => m.judge === judge && m.measure === measure) };
  }));
  return data.exitLayers.map((_, l) => {
    const cell = s * numLayers + l;
    if (!finish[cell]) return null;
    const bytes = hashes.subarray(cell * HASH_BYTES, (cell + 1) * HASH_BYTES);
    return {
      hash: Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(""),
      lengths: `${many(tokens[cell], "token")}, ${many(chars[cell], "character")}`,
      finish: finish[cell] === 2 ? "cut at the token limit" : "ended on its own",
      verdicts: verdicts
        .map((found) => ({ ...found, score: found.scores[cell], label: found.labels[found.codes[cell]] }))
        .filter(({ score }) => !Number.isNaN(score)),
    };
  });
}

// equal answers get the same letter
function nameAnswers(answers) {
  const letters = new Map();
  for (const answer of answers.flat().filter(Boolean)) {
    if (!letters.has(answer.hash)) letters.set(answer.hash, letterOf(letters.size));
    answer.letter = letters.get(answer.hash);
  }
}

function answerCell(answer, isMatch, text) {
  if (!answer) return element("td", "no answer", { class: "t-none" });
  const { letter, hash, lengths, finish } = answer;
  const known = [element("strong", `Answer ${letter}`), ` ${hash}; ${lengths}; ${finish}`];
  return element("td", [
    element("ul", answer.verdicts.map(verdictLine)),
    element("span", known, { class: "t-small" }),
    ...(text === null ? [] : textBlock(text)),
  ], isMatch ? { class: "t-match" } : {});
}

function verdictLine(verdict) {
  const { measure, score, label, saysMore } = verdict;
  const isRead = Number.isFinite(score) && (!WORDS[measure] || (score !== 0 && score !== 1));
  const said = WORDS[measure] || !isRead ? [outcomeOf(measure, score)] : [];
  if (isRead) said.push(Number(score.toPrecision(3)).toString());
  const parts = [titleOf(verdict), element("strong", said.join(", "))];
  if (label && (saysMore || score === Infinity)) parts.push(element("bdi", `(${label})`));
  return element("li", parts, { class: "t-verdict" });
}

function textBlock(text) {
  const block = element("div", text === "" ? "(empty)" : pieces(text), { class: "t-text", dir: "auto" });
  if (text.length <= PIECE) return [block];
  const button = element("button", [], { type: "button" });
  const show = (isAll) => {
    block.replaceChildren(...(isAll ? pieces(text) : [pieces(text.slice(0, PIECE))[0], "…"]));
    block.classList.toggle("t-long", isAll);
    if (isAll) block.setAttribute("tabindex", "0"); // it scrolls
    else block.removeAttribute("tabindex");
    button.textContent = isAll ? "Show less" : "Show all of this answer";
    button.setAttribute("aria-expanded", String(isAll));
  };
  button.addEventListener("click", () => show(button.getAttribute("aria-expanded") !== "true"));
  show(false);
  return [block, button];
}

// the browser lays out only the pieces in sight: one line of a megabyte would hang it
function pieces(text) {
  const found = [];
  for (let start = 0, end; start < text.length; start = end) {
    end = Math.min(start + PIECE, text.length);
    if (end < text.length && /[\ud800-\udbff]/.test(text[end - 1])) end -= 1; // never between the halves of a pair
    const piece = element("span", [], text.length > PIECE ? { class: "t-piece" } : {});
    piece.textContent = visible(text.slice(start, end));
    found.push(piece);
  }
  return found;
}

// ---- start ----

async function openSidecar() {
  const file = $("t-file").files[0];
  if (!file) return;
  if (!(await takeSidecar(file))) {
    const name = data.sidecar.name;
    throw new Error(`this file does not belong to this page; choose the ${name} that was written with it`);
  }
  $("t-sidecar-state").textContent = "The file is open.";
  await start();
  if (state.open >= 0) await showSample(state.open);
}

async function start() {
  if (!hasColumns() || !$("t-browser").hidden) return;
  await fillFilters();
  await search();
  $("t-browser").hidden = false;
}

// what fails is told in the page
const guarded = (work) => async (event) => {
  $("t-fault").textContent = "";
  try {
    await work(event);
  } catch (error) {
    $("t-fault").textContent = `Failed: ${visible(error.message)}.`;
  }
};

function on(id, type, work) {
  if ($(id)) $(id).addEventListener(type, guarded(work));
}

let waiting = 0;
function later() {
  clearTimeout(waiting);
  waiting = setTimeout(guarded(search), 150);
}

const toList = () => (rowButtons().find((row) => row.hasAttribute("aria-current")) || rowButtons()[0] || $("t-id")).focus();
const step = (by) => ({ currentTarget }) =>
  isAble(currentTarget) && openSample(state.matches[state.matches.indexOf(state.open) + by]);

on("t-filters", "input", later);
on("t-filters", "reset", later);
on("t-filters", "submit", (event) => event.preventDefault());
on("t-list", "keydown", onListKey);
on("t-list", "click", ({ target }) => target.closest("button") && openSample(Number(target.closest("button").dataset.sample)));
on("t-back", "click", ({ currentTarget }) => isAble(currentTarget) && turn(-1));
on("t-on", "click", ({ currentTarget }) => isAble(currentTarget) && turn(1));
on("t-before", "click", step(-1));
on("t-after", "click", step(1));
on("t-return", "click", toList);
on("t-detail", "keydown", ({ key }) => key === "Escape" && toList());
on("t-only", "change", () => state.open >= 0 && showSample(state.open));
on("t-file", "change", openSidecar);
guarded(start)();
