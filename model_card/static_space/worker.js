// The model's side of the page: downloads, checks and keeps the files, answers prompts, streams what it writes.
// The page starts this code from a blob, so that the page's content security policy holds here too.
const CDN = "https://cdn.jsdelivr.net/npm/";
const LIBRARY = {
  url: CDN + "@huggingface/transformers@4.3.1/dist/transformers.min.js",
  bytes: 586230,
  integrity: "sha384-AFNtlNOt2vbygtlRCUX2TDgkE+EyonjbCLxAfqezYwJJDVlozUhg+yKs4cPwyjHR",
};
const ORT = CDN + "onnxruntime-web@1.31.0-dev.20260914-8d85527a0/dist/ort-wasm-simd-threaded";
const RUNTIMES = {
  wasm: {
    mjs: {
      url: ORT + ".mjs",
      bytes: 24381,
      integrity: "sha384-rwgdUeIyqfd2lxMuhdqXYPnZiluDqSM5liz/q+ulIt4vYtB52NCoTVWBkm1KFOeN",
    },
    wasm: {
      url: ORT + ".wasm",
      bytes: 14264838,
      integrity: "sha384-LrOPe1yNsLVzhsriuQfxO06RWx/XakR0S8uiOMx7HVJP6N/IEaR1EAgJMFeTanif",
    },
  },
  webgpu: {
    mjs: {
      url: ORT + ".asyncify.mjs",
      bytes: 53057,
      integrity: "sha384-ik7L7J2uXfXmGuWHh3yOUDPpUslz/dJjcvZgdX5hcItLjxlkEpUF7mpCcATr3Dg8",
    },
    wasm: {
      url: ORT + ".asyncify.wasm",
      bytes: 26861777,
      integrity: "sha384-JuzrCV6BUmTUbsgNhgU94qo0vZ4l3w0VqgQAKPm0La2hXL9kmv8P9pGenfsWJY9c",
    },
  },
};

let settings, home, device, library, tokenizer, cache;
const models = {}; // promises, by "model" and "base"
let stopped = false;

const tell = (type, content = {}) => postMessage({ type, ...content });

async function sha384(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-384", bytes));
  return "sha384-" + btoa(String.fromCharCode(...digest));
}

// One file as an ArrayBuffer: from this browser's cache, or from the network and then kept.
// What comes from the CDN must have the digest that is written above.
async function read({ url, bytes, integrity }, arrived) {
  const kept = await cache?.match(url);
  if (kept) {
    arrived(bytes);
    return kept.arrayBuffer();
  }
  const response = await fetch(url);
  if (!response.ok) throw Error(`${url} answered ${response.status}`);
  const parts = [];
  let length = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    length += value.length;
    arrived(value.length);
  }
  const whole = new Uint8Array(length);
  parts.reduce((at, part) => (whole.set(part, at), at + part.length), 0);
  if (integrity && (await sha384(whole)) !== integrity) throw Error(`${url} is not the file that it should be`);
  await cache?.put(url, new Response(whole)).catch(() => { cache = null; }); // full, or forbidden: go on without
  return whole.buffer;
}

async function readAll(files) {
  const total = files.reduce((sum, file) => sum + file.bytes, 0);
  let loaded = 0;
  const arrived = (bytes) => tell("progress", { loaded: (loaded += bytes), total });
  return Promise.all(files.map((file) => read(file, arrived)));
}

const filesOf = (which) =>
  Object.entries(settings.models[which].files).map(([path, bytes]) => ({ url: `${home}${which}/${path}`, bytes }));

// WebGPU has no products of bytes; what is rounded to them is computed by WebAssembly.
async function chooseDevice(wanted) {
  const adapter = wanted === "wasm" || settings.dtype === "int8" ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  return adapter && !(adapter.info?.isFallbackAdapter && wanted !== "webgpu") ? "webgpu" : "wasm";
}

async function openCache() {
  try {
    const name = `fledge ${home} ${settings.version}`;
    for (const other of await caches.keys())
      if (other.startsWith(`fledge ${home} `) && other !== name) await caches.delete(other);
    return await caches.open(name);
  } catch {
    return null; // a private window, or a page inside another one
  }
}

async function openLibrary([code, factory, binary]) {
  const asModule = (bytes) => URL.createObjectURL(new Blob([bytes], { type: "text/javascript" }));
  library = await import(asModule(code));
  const { env } = library;
  env.useWasmCache = env.useBrowserCache = false;
  env.remoteHost = home;
  env.remotePathTemplate = "{model}/";
  env.backends.onnx.wasm.wasmPaths = { mjs: asModule(factory) };
  env.backends.onnx.wasm.wasmBinary = binary;
  env.backends.onnx.wasm.numThreads = 1; // several need headers that not every host sends
}

// Opens a model from bytes that are already here; the library itself asks for nothing.
async function openModel(which) {
  const files = filesOf(which);
  const shared = library ? [] : [LIBRARY, RUNTIMES[device].mjs, RUNTIMES[device].wasm];
  const content = await readAll([...shared, ...files]);
  tell("opening");
  if (!library) await openLibrary(content.slice(0, shared.length));
  const held = new Map(files.map((file, i) => [file.url, content[shared.length + i]]));
  library.env.fetch = async (url) =>
    held.has(`${url}`) ? new Response(held.get(`${url}`).slice(0)) : new Response(null, { status: 404 });
  tokenizer ??= await library.AutoTokenizer.from_pretrained("model");
  const open = () => library.AutoModelForCausalLM.from_pretrained(which, { dtype: settings.dtype, device });
  try {
    const model = await open();
    await answerOnce(model);
    return model;
  } catch (error) {
    if (device !== "webgpu") throw error;
    device = "wasm"; // the runtime for WebGPU computes there too
    return open();
  }
}

async function answerOnce(model) {
  const step = steps(model, [tokenizer.all_special_ids?.[0] ?? 0], { temperature: 0 }, 0);
  await step.next();
  await step.return();
}

async function load(which) {
  models[which] ??= openModel(which);
  try {
    return await models[which];
  } catch (error) {
    delete models[which];
    throw error;
  }
}

// sfc32: the same seed, the same numbers, in every browser.
function generator(seed) {
  let [a, b, c, d] = [0x9e3779b9, 0x243f6a88, 0xb7e15162, seed >>> 0];
  const next = () => {
    const t = (((a + b) | 0) + d) | 0;
    d = (d + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (c << 21) | (c >>> 11);
    c = (c + t) | 0;
    return (t >>> 0) / 4294967296;
  };
  for (let i = 0; i < 15; i++) next();
  return next;
}

// Draws the next token as transformers does in Python: repetition penalty, temperature, top-k, top-p, in this order.
function draw(logits, seen, { temperature, top_k = 0, top_p = 1, repetition_penalty = 1 }, random) {
  if (repetition_penalty !== 1)
    for (const id of seen) logits[id] = logits[id] < 0 ? logits[id] * repetition_penalty : logits[id] / repetition_penalty;
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  if (!temperature) return best;
  let sum = 0;
  const weights = logits.map((logit) => Math.exp((logit - logits[best]) / temperature));
  for (const weight of weights) sum += weight;
  // What is below the floor is outside of top-p for certain, and need not be sorted.
  const floor = ((1 - top_p) / weights.length) * sum;
  let ids = [];
  for (let id = 0; id < weights.length; id++) if (weights[id] >= floor) ids.push(id);
  ids.sort((one, other) => weights[other] - weights[one] || one - other);
  if (top_k) {
    ids = ids.slice(0, top_k);
    sum = ids.reduce((total, id) => total + weights[id], 0);
  }
  let kept = 0;
  let count = 0;
  while (count < ids.length && (count === 0 || kept < top_p * sum)) kept += weights[ids[count++]];
  let left = random() * kept;
  for (let i = 0; i < count - 1; i++) if ((left -= weights[ids[i]]) < 0) return ids[i];
  return ids[count - 1];
}

// Yields one token after another, with the cache of what has been read.
async function* steps(model, prompt, sampling, seed) {
  const { Tensor } = library;
  const random = generator(seed);
  const seen = new Set(prompt);
  let past = null;
  let length = 0;
  let ids = prompt;
  const whole = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  try {
    for (;;) {
      const places = ids.map((_, i) => length + i);
      length += ids.length;
      const outputs = await model({
        input_ids: whole(ids),
        attention_mask: whole(Array(length).fill(1)),
        position_ids: whole(places),
        past_key_values: past,
      });
      const older = past;
      past = {};
      for (const name in outputs)
        if (name.startsWith("present")) past[name.replace("present", "past_key_values")] = outputs[name];
      forget(older);
      const { data, dims } = outputs.logits;
      const id = draw(data.slice(-dims.at(-1)), seen, sampling, random);
      seen.add(id);
      yield id;
      ids = [id];
    }
  } finally {
    forget(past);
  }
}

const forget = (past) => Object.values(past ?? {}).forEach((part) => part.location === "gpu-buffer" && part.dispose());

// A control token that somebody types is text, and ends nothing.
function plain(text) {
  for (const token of tokenizer.all_special_tokens ?? [])
    text = text.replaceAll(token, token.slice(0, 1) + " " + token.slice(1));
  return text;
}

function promptOf(instruction) {
  const messages = [...settings.system, { role: "user", content: plain(instruction) }];
  const text = tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true });
  return tokenizer.encode(text, { add_special_tokens: false });
}

async function* answer(place, { which, instruction }, { seed, length, ...sampling }) {
  const model = await load(which);
  const prompt = promptOf(instruction);
  const left = settings.context - prompt.length;
  if (left < settings.shortest) throw Error("too long");
  const room = Math.min(length, left);
  const ends = [settings.ends].flat();
  const ids = [];
  let [milliseconds, why, text] = [0, "limit", ""];
  const next = steps(model, prompt, { ...settings.decoding, ...sampling }, seed);
  while (ids.length < room) {
    const begun = performance.now();
    const { value } = await next.next();
    milliseconds += performance.now() - begun;
    ids.push(value);
    if (ends.includes(value)) { why = "ended"; break; }
    text = tokenizer.decode(ids, { skip_special_tokens: true }).replace(/\uFFFD+$/, "").trim();
    tell("text", { place, text, tokens: ids.length, milliseconds });
    yield;
    if (stopped) { why = "stopped"; break; }
  }
  await next.return();
  tell("end", { place, text, why, tokens: ids.length, milliseconds });
}

// A turn of the event loop, in which the page's "stop" can arrive.
const turn = () =>
  new Promise((resume) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => { port1.close(); resume(); };
    port2.postMessage(0);
  });

// The answers grow side by side, a token each in turn.
async function write({ asked, options }) {
  stopped = false;
  for (const { which } of asked) await load(which);
  tell("ready", { device });
  let running = asked.map((one, place) => answer(place, one, options));
  while (running.length) {
    const ended = [];
    for (const one of running) {
      if ((await one.next()).done) ended.push(one);
      await turn();
    }
    running = running.filter((one) => !ended.includes(one));
  }
  tell("done");
}

onmessage = async ({ data }) => {
  try {
    if (data.type === "stop") stopped = true;
    else if (data.type === "write") await write(data);
    else {
      ({ settings, home } = data);
      [device, cache] = [await chooseDevice(data.device), await openCache()];
      await load("model");
      tell("ready", { device });
    }
  } catch (error) {
    tell("failed", { reason: `${error.message}` });
  }
};
