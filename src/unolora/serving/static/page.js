// The page to try the tasks. It asks the server that it came from, and nobody else.

const AT_ONCE = 128; // inputs of a request
const at = (id) => document.getElementById(id);
const state = { tasks: [], scales: false };

/** Make an element: attributes that are functions become listeners, children may be texts. */
function make(name, attributes = {}, ...children) {
  const found = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") found.addEventListener(key, value);
    else if (key.startsWith("--")) found.style.setProperty(key, value);
    else found.setAttribute(key, value);
  }
  found.append(...children);
  return found;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const chosen = () => state.tasks.filter((task) => at(`task-${task.name}`).checked);
const key = () => at("key").value.trim();

async function ask(path, body) {
  const headers = { "content-type": "application/json" };
  if (key()) headers.authorization = `Bearer ${key()}`;
  const options = body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) };
  const answer = await fetch(path, options);
  const found = await answer.json().catch(() => ({}));
  if (answer.ok) return found;
  if (answer.status === 401) at("secret").open = true;
  throw new Error(found.error?.message ?? `the server answered ${answer.status}`);
}

// --- what to ask ---------------------------------------------------------------------------------------------------

/** The input of a task that a line is, or a text that says why it is none. */
function input(task, line) {
  const parts = task.columns.length === 1 ? [line] : line.split("\t");
  if (parts.length !== task.columns.length) {
    return `reads ${task.columns.length} texts (${task.columns.join(", ")}): part them by a tab`;
  }
  return { task: task.name, columns: Object.fromEntries(task.columns.map((name, place) => [name, parts[place]])) };
}

/** For each line, of each chosen task, its input. */
function questions() {
  const lines = at("lines").value.split("\n").filter((line) => line.trim());
  return lines.map((line) => ({ line, cells: chosen().map((task) => ({ task, input: input(task, line) })) }));
}

async function predict(inputs) {
  const answers = [];
  for (let start = 0; start < inputs.length; start += AT_ONCE) {
    const found = await ask("/v1/predict", { inputs: inputs.slice(start, start + AT_ONCE), scores: true });
    answers.push(...found.answers);
  }
  return answers;
}

// --- answers -------------------------------------------------------------------------------------------------------

function card(task, answer) {
  const parts = [make("h3", {}, task.name)];
  if (typeof answer === "string") parts.push(make("p", { class: "wrong" }, answer));
  else if (answer.label === undefined) parts.push(make("p", { class: "label" }, answer.value.toFixed(3)));
  else {
    const shares = Object.entries(answer.probabilities).sort((one, other) => other[1] - one[1]);
    const bars = shares.map(([label, share]) =>
      make("li", { "--share": percent(share).replace(" ", "") }, make("span", {}, label), make("span", {}, percent(share))));
    parts.push(make("p", { class: "label" }, answer.label), make("ul", { class: "bars" }, ...bars));
  }
  return make("div", { class: "answer" }, ...parts);
}

function show(asked, answers) {
  let place = 0;
  const articles = asked.map(({ line, cells }) => {
    const cards = cells.map(({ task, input: given }) => card(task, typeof given === "string" ? given : answers[place++]));
    const inputs = cells.map((cell) => cell.input).filter((given) => typeof given !== "string");
    const article = make("article", {}, make("h2", {}, line.replaceAll("\t", " ⇥ ")), make("div", { class: "side" }, ...cards));
    if (state.scales && inputs.length) article.append(scales(inputs));
    return article;
  });
  at("answers").replaceChildren(...articles);
}

/** The heat maps of a line, fetched when they are opened. */
function scales(inputs) {
  const place = make("div", { class: "side" });
  const found = make("details", { toggle: fill }, make("summary", {}, "How each task scales the ranks for this text"), place);
  async function fill() {
    if (!found.open || place.hasChildNodes()) return;
    place.append("…");
    try {
      const { positions, answers } = await ask("/v1/scales", { inputs });
      const all = answers.flatMap((answer) => answer.scales.flat().map((s) => Math.abs(s - 1)));
      const most = Math.max(...all, 1e-9);
      place.before(make("p", { class: "key" },
        "s, a row for each adapted projection, a column for each rank: 1 leaves a rank as it is, blue is less, orange more."));
      place.replaceChildren(...answers.map((answer) => heat(answer, short(positions), most)));
    } catch (error) {
      place.replaceChildren(make("p", { class: "wrong" }, error.message));
    }
  }
  return found;
}

/** Names of projections without what all of them share; where only a number would be left, with what comes after it. */
function short(names) {
  const parts = names.map((name) => name.split("."));
  const same = (place) => parts.every((each) => each[place] === parts[0][place]);
  return parts.map((each) => {
    const own = each.filter((_, place) => each.length < 2 || !same(place)).join(".") || each.at(-1);
    return /\D/.test(own) ? own : each.slice(each.indexOf(own)).join(".");
  });
}

function heat({ task, scales: rows }, names, most) {
  const cell = (s) => make("td", {
    class: s < 1 ? "less" : "more",
    "--strength": `${Math.round((70 * Math.abs(s - 1)) / most)}%`,
  }, s.toFixed(2));
  const ranks = rows[0].map((_, place) => make("th", { scope: "col" }, String(place + 1)));
  const head = make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "rank"), ...ranks));
  const body = rows.map((row, place) => make("tr", {}, make("th", { scope: "row" }, names[place]), ...row.map(cell)));
  const table = make("table", { class: "heat" }, make("caption", {}, task), head, make("tbody", {}, ...body));
  return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `scales of ${task}` }, table);
}

// --- copies --------------------------------------------------------------------------------------------------------

function python(value, indent = "") {
  const inner = `${indent}    `;
  if (Array.isArray(value)) return `[\n${value.map((each) => inner + python(each, inner)).join(",\n")},\n${indent}]`;
  if (value === true) return "True";
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${python(each, indent)}`).join(", ")}}`;
}

function copies(inputs) {
  const body = { inputs, scores: true }, url = `${location.origin}/v1/predict`;
  const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
  const shell = key() ? " \\\n  -H \"authorization: Bearer $UNOLORA_KEY\"" : "";
  at("curl").textContent = `curl ${url} \\\n  -H 'content-type: application/json'${shell} \\\n  --data-raw '${quoted}'`;
  const header = key() ? ", \"authorization\": \"Bearer \" + os.environ[\"UNOLORA_KEY\"]" : "";
  at("python").textContent = `import json${key() ? ", os" : ""}, urllib.request

body = ${python(body)}
request = urllib.request.Request(
    "${url}", json.dumps(body).encode(), {"content-type": "application/json"${header}}
)
print(json.load(urllib.request.urlopen(request)))`;
  at("copy").hidden = false;
}

async function copy(event) {
  const button = event.currentTarget, source = at(button.dataset.copies);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch { // no clipboard, as over plain http from another machine: select it instead
    getSelection().selectAllChildren(source);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// --- the form ------------------------------------------------------------------------------------------------------

/** What a task's answers are: its labels, or what its number means. */
function about(task) {
  if (!task.labels.length) return task.description || "a number";
  return task.labels.slice(0, 6).join(", ") + (task.labels.length > 6 ? ", …" : "");
}

async function load() {
  const found = await ask("/v1/tasks");
  Object.assign(state, { tasks: found.tasks, scales: found.scales });
  document.title = `${found.run} · unolora`;
  at("run").textContent = found.run;
  at("about").firstChild.textContent = `${found.method} on ${found.backbone}, ${found.tasks.length} tasks, one adapter. `;
  at("pairs").hidden = found.tasks.every((task) => task.columns.length === 1);
  at("choices").replaceChildren(...found.tasks.map((task) => make("label", { title: task.description },
    make("input", { type: "checkbox", id: `task-${task.name}`, checked: "" }),
    make("span", {}, task.name),
    make("small", {}, about(task)))));
}

async function submit(event) {
  event.preventDefault();
  const began = performance.now();
  at("problem").textContent = "";
  at("ask").disabled = true;
  try {
    sessionStorage.setItem("key", key());
    if (!state.tasks.length) await load();
    const asked = questions();
    const inputs = asked.flatMap(({ cells }) => cells.map((cell) => cell.input)).filter((given) => typeof given !== "string");
    if (!chosen().length) throw new Error("Pick a task.");
    if (!asked.length) throw new Error("Write a text.");
    at("status").textContent = "…";
    const answers = await predict(inputs);
    show(asked, answers);
    if (inputs.length) copies(inputs.slice(0, AT_ONCE));
    at("status").textContent = `${answers.length} answers in ${Math.round(performance.now() - began)} ms`;
  } catch (error) {
    at("status").textContent = "";
    at("problem").textContent = error.message;
  } finally {
    at("ask").disabled = false;
  }
}

function pick(all) {
  for (const box of at("choices").querySelectorAll("input")) box.checked = all;
}

at("form").addEventListener("submit", submit);
at("lines").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
at("all").addEventListener("click", () => pick(true));
at("none").addEventListener("click", () => pick(false));
for (const button of document.querySelectorAll("[data-copies]")) button.addEventListener("click", copy);
at("key").value = sessionStorage.getItem("key") ?? "";
load().catch((error) => { at("problem").textContent = error.message; });
