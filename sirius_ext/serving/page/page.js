// A chat in which it can be seen where each token comes from. It asks the server that it came from, and nobody else.

const $ = (id) => document.getElementById(id);
const SPARSE = ["csparse", "fsparse", "cascade"];
const THEMES = ["system", "dark", "light"];

let conversation = []; // what is sent: role and content
let model = "";
let running = null; // of the answer that is coming: an AbortController

class Refused extends Error {}

function headers() {
  const found = { "Content-Type": "application/json" };
  if ($("key").value) found.Authorization = `Bearer ${$("key").value}`;
  return found;
}

// The server's answer to a request, or an Error with its own words.
async function request(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers() });
  if (response.ok) return response;
  if (response.status === 401) $("key-row").hidden = false;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not in the server's words: the status is all that is known.
  }
  throw new Refused(message);
}

// The values of server-sent events, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function settings(mode) {
  const chosen = { trace: true, mode: SPARSE.includes(mode) ? "sparse" : mode };
  if (SPARSE.includes(mode)) chosen.sparsity = mode;
  if (mode === "sirius") {
    chosen.period = $("period").value === "auto" ? "auto" : Number($("period").value);
    chosen.tree_width = Number($("tree_width").value);
    if (Number($("temperature").value) === 0) {
      chosen.accept = $("accept").value;
      if (chosen.accept === "threshold") chosen.threshold = Number($("threshold").value);
    }
  }
  return chosen;
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share >= 0.1 ? `${share.toFixed(1)} %` : `${share.toPrecision(2)} %`;
}

function quoted(text) {
  return `“${text.replaceAll("\n", "⏎")}”`;
}

function explain(token) {
  const likelihood = token.logprob === undefined ? "" : `\nF's likelihood: ${percent(token.logprob)}`;
  if (token.replaced) {
    const other = token.replaced;
    return (
      `${quoted(token.text)} is F's own, in place of S's ${quoted(other.text)}` +
      `\nF's likelihood: ${percent(token.logprob)}, of S's token ${percent(other.logprob)}`
    );
  }
  const whose = {
    draft: "drafted by S and kept by F",
    full: "F's own",
    copy: "copied from the text and kept by F",
    sparse: "of S alone; the likelihood is S's",
  }[token.source];
  return `${quoted(token.text)}: ${whose}${token.source === "sparse" ? likelihood.replace("F's", "S's") : likelihood}`;
}

function element(kind, name, text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

function tokenElement(token) {
  const made = element("span", `token ${token.replaced ? "replaced" : token.source}`, token.text);
  const words = explain(token);
  made.title = words;
  const show = () => {
    $("detail").textContent = words;
  };
  made.addEventListener("pointerenter", show);
  if (token.replaced) {
    made.tabIndex = 0;
    made.setAttribute("role", "note");
    made.setAttribute("aria-label", words);
    made.addEventListener("focus", show);
  }
  return made;
}

function statsLine(stats) {
  const parts = [];
  if (stats.tokens_per_second) parts.push(`${stats.tokens_per_second.toFixed(1)} tokens/s`);
  if (stats.average_advance_length) parts.push(`AAL ${stats.average_advance_length.toFixed(2)}`);
  if (stats.effective_density) parts.push(`effective density ${stats.effective_density.toFixed(3)}`);
  if (stats.corrected_fraction !== null) parts.push(`corrected ${(100 * stats.corrected_fraction).toFixed(1)} %`);
  parts.push(`${stats.tokens} tokens`, `${stats.reused_tokens} of ${stats.prompt_tokens} prompt tokens from the cache`);
  return parts.join(" · ");
}

// One answer into a box. Returns its text, also where it is stopped.
async function answer(mode, messages, box, signal) {
  const text = element("p", "answer");
  const stats = element("p", "stats");
  box.append(element("h3", "", mode), text, stats);
  const body = {
    model,
    messages,
    stream: true,
    max_tokens: Number($("max_tokens").value),
    temperature: Number($("temperature").value),
    sirius: settings(mode),
  };
  let whole = "";
  let shown = "";
  try {
    const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    for await (const event of events(response)) {
      whole += event.choices[0]?.delta.content ?? "";
      for (const token of event.sirius?.tokens ?? []) {
        text.append(tokenElement(token));
        shown += token.text;
      }
      if (event.sirius?.period) text.append(element("span", "end"));
      if (event.sirius?.stats) stats.textContent = statsLine(event.sirius.stats);
      if (event.choices[0]?.finish_reason === "length") stats.textContent += " · cut at the limit";
      $("log").scrollTop = $("log").scrollHeight;
    }
    // A character whose last token did not come is only in the text.
    if (whole.startsWith(shown)) text.append(whole.slice(shown.length));
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    stats.textContent += " · stopped";
  }
  return whole;
}

async function send(text) {
  const asked = [...conversation, { role: "user", content: text }];
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...asked] : asked;
  const mode = $("mode").value;
  const modes = $("both").checked && mode !== "full" ? ["full", mode] : [mode];
  const said = element("p", "said", text);
  const boxes = element("div", modes.length > 1 ? "answers two" : "answers");
  $("log").append(said, boxes);
  running = new AbortController();
  busy(true);
  try {
    const columns = modes.map(() => boxes.appendChild(element("section", "")));
    const coming = modes.map((each, place) => answer(each, messages, columns[place], running.signal));
    const texts = await Promise.all(coming);
    conversation = [...asked, { role: "assistant", content: texts.at(-1) }];
    $("prompt").value = "";
  } catch (error) {
    running.abort(); // the other column, if there is one
    boxes.remove();
    said.remove();
    fail(error);
  } finally {
    running = null;
    busy(false);
  }
}

function busy(on) {
  $("send").disabled = on;
  $("stop").disabled = !on;
  $("log").setAttribute("aria-busy", String(on)); // a screen reader reads the answer once, at its end
  if (on) $("error").hidden = true;
  else $("prompt").focus();
}

function fail(error) {
  const unreachable = error instanceof TypeError; // what fetch throws
  $("error").textContent = unreachable ? "the server cannot be reached" : error.message;
  $("error").hidden = false;
}

function stop() {
  running?.abort();
}

async function begin() {
  const served = await (await request("v1/sirius")).json();
  model = served.model;
  $("model").textContent = model;
  for (const name of ["period", "tree_width", "threshold"]) $(name).value = served.config[name];
  $("accept").value = served.config.accept;
  $("mode").value = served.config.mode === "sparse" ? served.config.sparsity : served.config.mode;
  $("temperature").value = served.temperature;
  $("max_tokens").value = served.max_tokens;
  enable();
}

// What a mode does not use cannot be set.
function enable() {
  const corrects = $("mode").value === "sirius";
  const drawn = Number($("temperature").value) > 0;
  for (const id of ["period", "tree_width"]) $(id).disabled = !corrects;
  $("accept").disabled = !corrects || drawn;
  $("threshold").disabled = !corrects || drawn || $("accept").value !== "threshold";
}

function theme(name) {
  document.documentElement.classList.remove("dark", "light");
  if (name !== "system") document.documentElement.classList.add(name);
  $("theme").textContent = `Theme: ${name}`;
  $("theme").setAttribute("aria-label", `theme: ${name === "system" ? "as the system has it" : name}`);
  localStorage.setItem("theme", name);
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (running || !text) return;
  try {
    if (!model) await begin();
    if ($("settings").reportValidity()) await send(text);
  } catch (error) {
    fail(error);
  }
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("settings").addEventListener("input", enable);
$("stop").addEventListener("click", stop);
$("reset").addEventListener("click", () => {
  stop();
  conversation = [];
  $("log").replaceChildren();
  $("error").hidden = true;
  $("prompt").focus();
});
$("show").addEventListener("change", () => $("log").classList.toggle("show", $("show").checked));
$("theme").addEventListener("click", () => {
  const now = localStorage.getItem("theme") ?? "system";
  theme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
});

$("log").classList.toggle("show", $("show").checked);
theme(localStorage.getItem("theme") ?? "system");
begin().catch(fail);
