"use strict";
// Answers only ever become text nodes: whatever a model wrote, it cannot become part of the page.
const { answers, samples, columns, least, lower_is_better } = JSON.parse(document.getElementById("data").textContent);
const WHO = { base: "base", model: "instruct" };
const PAGE = 10;
const $ = (id) => document.getElementById(id);
const title = (name) => name.replaceAll("_", " ");

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// A constraint is met from its least value on. A metric that is only ever 0 or 1 is met or missed as well.
const values = {};
for (const sample of samples)
  for (const who in WHO)
    for (const [name, value] of Object.entries(sample[who].scores)) (values[name] ??= new Set()).add(value);
const constraints = Object.keys(values)
  .filter((name) => name in least || [...values[name]].every((value) => value === 0 || value === 1))
  .filter((name) => !lower_is_better.includes(name));
const isMet = (name, value) => (value === undefined ? undefined : value >= (least[name] ?? 1));

// What the heading of an answer says already, and what is no concern of a single answer.
const UNMARKED = ["eos_rate", "answer_tokens", "distinct_answers", "same_ending"];

function chips(scores) {
  const row = make("div", "chips");
  for (const [name, value] of Object.entries(scores)) {
    if (UNMARKED.includes(name)) continue;
    const isConstraint = constraints.includes(name);
    const met = isMet(name, value);
    const number = isConstraint && (value === 0 || value === 1) ? "" : ` ${+value.toFixed(value < 10 ? 2 : 0)}`;
    const shown = (isConstraint ? (met ? "✓ " : "✗ ") : "") + title(name) + number;
    row.append(make("span", "chip" + (isConstraint ? (met ? " met" : " missed") : ""), shown));
  }
  return row;
}

function request(sample) {
  const box = make("div", "ask");
  for (const message of sample.messages) {
    if (sample.messages.length > 1) box.append(make("span", "role", message.role));
    box.append(message.content);
  }
  return box;
}

function answer(text, heading, className) {
  const body = make("div", text ? "text" : "text empty", text || "(an empty answer)");
  return make("div", "answer " + className, make("h3", "", heading), body);
}

// An address of its own for each answer: report.html#answer-12, or #answer-12-2 for the second answer to a prompt.
const linkOf = (sample) => `#answer-${sample.prompt + 1}` + (sample.sample ? `-${sample.sample + 1}` : "");

function show(sample) {
  const pair = make("div", "pair");
  for (const who in WHO) {
    const of = sample[who];
    const ended = of.stopped ? "stopped by itself" : "did not stop";
    const side = answer(of.text, `${WHO[who]} · ${of.tokens} tokens, ${ended}`, `of-${who}`);
    side.firstChild.classList.add(who);
    side.insertBefore(chips(of.scores), side.lastChild);
    pair.append(side);
  }
  const number = `prompt ${sample.prompt + 1}` + (sample.sample ? `, answer ${sample.sample + 1}` : "");
  const link = make("a", "", number);
  link.href = linkOf(sample);
  const written = make("details", "", make("summary", "", "the held-out answer"), make("div", "text", sample.reference));
  return make("article", "sample", make("div", "soft small", link), request(sample), pair, written);
}

const haystacks = samples.map((s) =>
  [...s.messages.map((m) => m.content), s.base.text, s.model.text].join("\n").toLowerCase());

function chosen() {
  const wanted = $("search").value.trim().toLowerCase();
  const name = $("constraint").value;
  const which = $("which").value;
  const [column, label] = JSON.parse($("class").value);
  return samples.filter((sample, i) => {
    if (wanted && !haystacks[i].includes(wanted)) return false;
    if (column && sample[column] !== label) return false;
    const [base, model] = [isMet(name, sample.base.scores[name]), isMet(name, sample.model.scores[name])];
    if (base === undefined && model === undefined) return false;
    return { "": true, model1: model === true, model0: model === false, base1: base === true, base0: base === false,
      gained: base === false && model === true, lost: base === true && model === false }[which];
  });
}

let shown = PAGE;
function list() {
  const linked = samples.filter((sample) => linkOf(sample) === location.hash);
  const found = linked.length ? linked : chosen();
  $("all").hidden = !linked.length;
  $("count").textContent = `${found.length} of ${samples.length}`;
  $("list").replaceChildren(...found.slice(0, shown).map(show));
  // Of a conversation the last question is what was asked.
  for (const box of document.querySelectorAll("#list .ask")) if (box.childElementCount > 2) box.scrollTop = box.scrollHeight;
  $("more").hidden = found.length <= shown;
}

for (const name of constraints) $("constraint").append(new Option(title(name), name));
$("class").append(new Option("all classes", JSON.stringify([])));
for (const column of columns)
  for (const label of [...new Set(samples.map((sample) => sample[column]))].sort())
    $("class").append(new Option(`${title(column)}: ${label}`, JSON.stringify([column, label])));
$("class").hidden = !columns.length;
for (const id of ["search", "constraint", "which", "class"])
  $(id).addEventListener("input", () => { shown = PAGE; unlink(); });
function unlink() {
  if (location.hash.startsWith("#answer-")) history.replaceState(null, "", "#answers");
  list();
}
$("all").addEventListener("click", unlink);
addEventListener("hashchange", () => {
  list();
  if (location.hash.startsWith("#answer-")) $("answers").scrollIntoView();
});
$("more").addEventListener("click", () => { shown += PAGE; list(); });
list();
if (location.hash.startsWith("#answer-")) $("answers").scrollIntoView();

// The blind mode. Pairs come in a random order, the sides are drawn for each, and a rating is kept at once.
const KEPT = `fledge-ratings-${answers}`;
const ratings = new Map();
try {
  for (const rating of JSON.parse(localStorage.getItem(KEPT) ?? "[]")) ratings.set(`${rating.prompt} ${rating.sample}`, rating);
} catch { /* a page opened from a file may have no storage: the ratings then live until it is closed */ }
const random = (below) => crypto.getRandomValues(new Uint32Array(1))[0] % below;
let queue = [];
let sides = ["base", "model"];

function next() {
  const left = queue.length;
  $("bar").style.width = `${(100 * ratings.size) / samples.length}%`;
  $("rated").textContent = `${ratings.size} of ${samples.length} rated`;
  for (const button of document.querySelectorAll("[data-choice]")) button.disabled = !left;
  if (!left) {
    const said = { model: 0, base: 0, tie: 0 };
    for (const rating of ratings.values()) said[rating.preferred] += 1;
    $("pair").replaceChildren(
      make("p", "", `All rated. Instruct preferred ${said.model} times, base ${said.base}, neither ${said.tie}.`));
    return;
  }
  if (random(2)) sides.reverse();
  const [left_, right] = sides.map((who) => queue[0][who].text);
  $("pair").replaceChildren(request(queue[0]), make("div", "pair", answer(left_, "Left", ""), answer(right, "Right", "")));
}

function rate(choice) {
  if (!queue.length) return;
  const { prompt, sample } = queue.shift();
  ratings.set(`${prompt} ${sample}`, { prompt, sample, preferred: choice === "tie" ? "tie" : sides[choice] });
  try { localStorage.setItem(KEPT, JSON.stringify([...ratings.values()])); } catch { /* see above */ }
  next();
  scrollTo(0, 0);
}

$("rate").addEventListener("click", () => {
  queue = samples.filter((s) => !ratings.has(`${s.prompt} ${s.sample}`));
  for (let i = queue.length - 1; i > 0; i--) {
    const j = random(i + 1);
    [queue[i], queue[j]] = [queue[j], queue[i]];
  }
  document.body.classList.add("blind");
  next();
  scrollTo(0, 0);
});
$("leave").addEventListener("click", () => { document.body.classList.remove("blind"); $("answers").scrollIntoView(); });
for (const button of document.querySelectorAll("[data-choice]"))
  button.addEventListener("click", () => rate(button.dataset.choice));
addEventListener("keydown", (event) => {
  const choice = { 1: "0", 2: "1", 0: "tie" }[event.key];
  if (document.body.classList.contains("blind") && choice && !event.ctrlKey && !event.metaKey) rate(choice);
});
$("save").addEventListener("click", () => {
  const content = JSON.stringify({ answers, ratings: [...ratings.values()] }, null, 2);
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  link.download = "ratings.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
