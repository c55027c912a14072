// The page's side: what a visitor asks for goes to the worker, and what it writes becomes text nodes, never markup.
const settings = JSON.parse(document.getElementById("settings").textContent);
const { form: ask, models } = settings;
const $ = (id) => document.getElementById(id);
const home = new URL("./", location.href).href;
const HOW = { ended: "complete", limit: "cut off", stopped: "stopped" };
const DEVICES = { webgpu: "WebGPU", wasm: "WebAssembly" };
let worker, cards;
let [state, waiting, chosenSeed] = ["loading", null, false]; // the state is loading, ready, writing or failed

const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1000000;
const endingField = () => document.querySelector("input[name=ending]:checked");

function say(text, failed = false) {
  $("status").textContent = text;
  $("status").parentElement.classList.toggle("failed", failed);
}

function enter(next) {
  state = next;
  $("write").textContent = next === "writing" ? "Stop" : "Write";
  $("progress").hidden = next !== "loading";
  $("answers").ariaBusy = next === "writing";
  for (const id of ["again", "share"]) $(id).hidden = next !== "ready" || !cards;
}

// The worker inherits the page's content security policy only if it starts from a blob.
async function start(device) {
  worker?.terminate();
  enter("loading");
  const code = await (await fetch("worker.js")).blob();
  worker = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })), { type: "module" });
  worker.onmessage = ({ data }) => hear[data.type](data);
  worker.postMessage({ type: "load", settings, home, device });
}

const hear = {
  progress: ({ loaded, total }) => {
    if (state === "failed") return; // of a file that was still on its way
    $("progress").hidden = false;
    $("progress").value = loaded / total;
    say(`Loading ${megabytes(loaded)} of ${megabytes(total)} MB, once for this browser`);
  },
  opening: () => say("Opening the model…"),
  ready: ({ device }) => {
    $("progress").hidden = true;
    say(`Ready. ${settings.size} The model is computed by ${DEVICES[device]}.`);
    if (state === "loading") enter("ready");
    else if (state === "writing") say("Writing…");
    if (waiting) write(...waiting);
  },
  text: ({ place, text, tokens, milliseconds }) => show(cards[place], text, tokens, milliseconds),
  end: ({ place, text, tokens, milliseconds, why }) => {
    show(cards[place], text || "(nothing)", tokens, milliseconds, HOW[why]);
    cards[place].card.classList.remove("writing");
  },
  done: () => {
    enter("ready");
    say(cards.length > 1 ? `Done: ${cards.length} answers.` : "Done.");
  },
  failed: ({ reason }) => {
    waiting = cards = null;
    $("answers").replaceChildren();
    $("answers").hidden = $("progress").hidden = true;
    if (reason === "too long") {
      enter("ready");
      say("");
      complain("That is longer than the model can read; please shorten it.");
    } else {
      enter("failed");
      say(`The model failed: ${reason}. Press Write to try again.`, true);
    }
  },
};

function complain(text) {
  $("problem").textContent = text;
  $("topic").ariaInvalid = Boolean(text);
  if (text) $("topic").focus();
}

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

async function copy(button, text) {
  const label = button.textContent;
  await navigator.clipboard.writeText(text).then(
    () => { button.textContent = "Copied"; },
    () => { button.textContent = "Not allowed here"; },
  );
  setTimeout(() => { button.textContent = label; }, 1500);
}

function addCard({ which, ending }, compared) {
  const heading = ending ? `${ending[0].toUpperCase()}${ending.slice(1)} ending` : "Answer";
  const [text, figures, button] = [make("p", "text"), make("span", "soft"), make("button", "", "Copy")];
  button.type = "button";
  button.ariaLabel = `Copy: ${heading}`;
  button.addEventListener("click", () => copy(button, text.textContent));
  const tag = compared ? [make("span", "tag", which === "base" ? "base" : "instruct")] : [];
  const card = make("article", `answer card writing of-${which}`, make("header", "", make("h2", "", heading), ...tag), text,
    make("footer", "", figures, button));
  $("answers").append(card);
  return { card, text, figures };
}

function show({ text, figures }, content, tokens, milliseconds, how = "") {
  text.textContent = content;
  figures.textContent = `${tokens} tokens, ${Math.round((1000 * tokens) / milliseconds)}/s${how && ", " + how}`;
}

function write(topic, ending, beside, options) {
  waiting = null;
  const endings = ending === "all" ? ask.endings : [ending];
  const asked = endings.flatMap((one) => (beside ? ["model", "base"] : ["model"]).map((which) => ({
    // A function, because "$&" in a string would be replaced; the topic comes last, and nothing in it is replaced.
    which, ending: one, instruction: ask.instruction.replace("{ending}", () => one).replace("{topic}", () => topic),
  })));
  $("answers").replaceChildren();
  $("answers").hidden = false;
  cards = asked.map((one) => addCard(one, beside));
  enter("writing");
  say("Writing…");
  const link = new URLSearchParams({ topic, ...(ending && { ending }), ...(beside && { base: 1 }), ...options });
  history.replaceState(null, "", `#${link}`);
  worker.postMessage({ type: "write", asked, options });
  $("answers").scrollIntoView({ block: "nearest" });
}

function submit() {
  const typed = $("topic").value.trim();
  const topic = ask.instruction === "{topic}" ? typed : typed.replace(/\s+/g, " "); // a prompt may have lines
  if (!topic) return complain(ask.empty);
  complain("");
  if (!chosenSeed || !$("seed").value) $("seed").value = randomSeed();
  chosenSeed = false;
  const options = {
    seed: Number($("seed").value),
    temperature: Number($("temperature").value),
    length: Math.max(1, Number($("length").value) || settings.length),
  };
  const given = [topic, endingField()?.value ?? "", Boolean($("base")?.checked), options];
  if (state === "ready") write(...given);
  else {
    waiting = given;
    say("Writing starts as soon as the model is here.");
    if (state === "failed") start($("device").value);
  }
}

function choose(topic, ending) {
  $("topic").value = topic;
  for (const field of document.querySelectorAll("input[name=ending]")) field.checked = field.value === ending;
  if (ask.endings.length && !endingField()) document.querySelector("input[name=ending]").checked = true;
}

// What a link asks for is written at once.
function followLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  if (!link.get("topic")) return;
  choose(link.get("topic").slice(0, 4000), link.get("ending"));
  if ($("base")) $("base").checked = link.has("base");
  for (const id of ["seed", "temperature", "length"]) if (link.get(id)) $(id).value = link.get(id);
  $("warmth").value = $("temperature").value;
  chosenSeed = true;
  submit();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state === "writing") worker.postMessage({ type: "stop" });
  else submit();
});
$("topic").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (state !== "writing") submit();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state === "writing") worker.postMessage({ type: "stop" });
});
$("again").addEventListener("click", () => {
  chosenSeed = false;
  submit();
  $("write").focus();
});
$("share").addEventListener("click", () => copy($("share"), location.href));
for (const button of document.querySelectorAll("[data-example]"))
  button.addEventListener("click", () => {
    if (state === "writing") return;
    choose(...ask.examples[button.dataset.example]);
    submit();
    $("form").scrollIntoView({ block: "nearest" });
  });
$("seed").addEventListener("input", () => { chosenSeed = true; });
$("temperature").addEventListener("input", () => { $("warmth").value = $("temperature").value; });
$("device").addEventListener("change", () => start($("device").value));
$("device").previousElementSibling.hidden = $("device").hidden = !navigator.gpu || settings.dtype === "int8";
$("warmth").value = $("temperature").value;
addEventListener("hashchange", followLink);
navigator.serviceWorker?.register("service_worker.js").catch(() => {}); // without it the page needs a network
await start("");
followLink();
