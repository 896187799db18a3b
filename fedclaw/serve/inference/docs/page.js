"use strict";
// Names, levels and answers come from others: they are put in as text, never as markup.
let token = "";
const SHOWN = 20;
const place = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const found = Object.assign(document.createElement(tag), properties);
  found.append(...children);
  return found;
}

function headers(more = {}) {
  return token ? { ...more, authorization: "Bearer " + token } : more;
}

async function asked(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers(options.headers), cache: "no-store", credentials: "omit" });
  const text = await answer.text();
  let told;
  try { told = JSON.parse(text); } catch { told = { error: text.slice(0, 500) }; }
  if (!answer.ok) throw new Error(told.error || "the node answered " + answer.status);
  return { told, version: answer.headers.get("fedclaw-version") };
}

async function showModels() {
  const state = place("state");
  state.className = "";
  state.textContent = "Asking the node…";
  place("models").replaceChildren();
  try {
    const { told } = await asked("openapi.json");
    const names = Object.keys(told.paths).filter((path) => path.startsWith("/predict/")).map((path) => path.slice(9));
    place("about").textContent = told.info.title + " " + told.info.version + ". " + told.info.description;
    state.textContent = names.length ? "" : "There is no model that this token may ask.";
    for (const name of names) place("models").append(model(told, name));
  } catch (error) {
    state.className = "warn";
    state.textContent = String(error.message);
  }
}

function model(told, name) {
  const post = told.paths["/predict/" + name].post;
  const content = post.requestBody.content;
  const tag = told.tags.find((own) => own.name === name) || {};
  const section = make("section", {}, make("h2", { textContent: name }), make("p", { textContent: tag.description || "" }));
  const answers = make("div");
  answers.setAttribute("aria-live", "polite");
  const rows = content["application/json"];
  if (rows) section.append(rowForm(name, rows, answers));
  section.append(fileForm(name, Object.keys(content).filter((kind) => kind !== "application/json"), answers), answers);
  section.append(columns(rows), command(name, content));
  return section;
}

function rowForm(name, rows, answers) {
  const row = rows.schema.anyOf[0].properties.rows.items;
  const example = rows.example ? rows.example.rows[0] : {};
  const form = make("form", {}, make("h3", { textContent: "One row" }));
  const fields = make("div", { className: "fields" });
  const readers = {};
  row.required.forEach((column, number) => {
    const id = name + "/" + number;
    const [input, read] = field(row.properties[column], example[column]);
    input.id = id;
    readers[column] = read;
    fields.append(make("div", {}, make("label", { htmlFor: id, textContent: column }), input));
  });
  form.append(fields, make("button", { type: "submit", textContent: "Predict" }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const values = Object.fromEntries(Object.entries(readers).map(([column, read]) => [column, read()]));
    const body = JSON.stringify({ rows: [values] });
    send(form, name, { method: "POST", body, headers: { "content-type": "application/json" } }, answers);
  });
  return form;
}

function field(schema, example) {
  const type = [].concat(schema.type || []);
  const options = schema.enum ? schema.enum.filter((level) => level !== null) : type.includes("boolean") ? ["true", "false"] : null;
  if (options) {
    const input = make("select", {}, make("option", { value: "-1", textContent: "not known" }));
    options.forEach((level, number) => {
      const chosen = String(example) === String(level);
      input.append(make("option", { value: String(number), textContent: level, selected: chosen }));
    });
    return [input, () => (input.value === "-1" ? null : schema.enum ? options[Number(input.value)] : input.value === "0")];
  }
  const number = type.includes("number");
  const input = make("input", { type: number ? "number" : "text", placeholder: "not known", value: example ?? "" });
  if (number) Object.assign(input, { step: "any", min: schema.minimum ?? "", max: schema.maximum ?? "" });
  return [input, () => (input.value === "" ? null : number ? Number(input.value) : input.value)];
}

const SUFFIXES = {
  "text/csv": ".csv", "image/png": ".png", "image/jpeg": ".jpg,.jpeg",
  "application/x-npz": ".npz",
};

function fileForm(name, kinds, answers) {
  const id = name + "/file";
  const accept = kinds.map((kind) => SUFFIXES[kind]).join(",");
  const input = make("input", { type: "file", id, accept, required: true });
  const label = make("label", { htmlFor: id }, "A file ", make("span", { className: "quiet", textContent: "(" + accept.replaceAll(",", ", ") + ")" }));
  const form = make("form", {}, make("h3", {}, label), make("div", { className: "line" }, input, make("button", { type: "submit", textContent: "Predict" })));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const file = input.files[0];
    const kind = kinds.find((own) => SUFFIXES[own].split(",").some((end) => file.name.toLowerCase().endsWith(end)));
    send(form, name, { method: "POST", body: file, headers: { "content-type": kind || file.type } }, answers);
  });
  return form;
}

async function send(form, name, options, answers) {
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const { told, version } = await asked("predict/" + encodeURIComponent(name), options);
    answers.replaceChildren(answer(told.rows, version || told.model_version));
  } catch (error) {
    answers.replaceChildren(make("p", { className: "answer warn", textContent: String(error.message) }));
  } finally {
    button.disabled = false;
  }
}

function answer(rows, version) {
  const box = make("div", { className: "answer" });
  if (rows.length === 1) box.append(...one(rows[0]));
  else box.append(table(rows));
  if (version) box.append(make("p", { className: "quiet", textContent: "version " + version }));
  return box;
}

function one(row) {
  if (row.refused) return [make("p", { className: "warn", textContent: row.refused })];
  if (!row.probabilities) return [make("p", { className: "given", textContent: String(row.value ?? row.values) })];
  const chances = Object.entries(row.probabilities).map(([label, chance]) => {
    const meter = make("meter", { min: 0, max: 1, value: chance });
    meter.setAttribute("aria-label", label);
    return make("div", { className: "chance" }, make("span", { textContent: label }), meter, make("span", { textContent: (100 * chance).toFixed(1) + " %" }));
  });
  return [make("p", { className: "given", textContent: row.label }), ...chances];
}

function table(rows) {
  const said = (row) => row.refused || row.label || String(row.value ?? row.values);
  const chance = (row) => (row.probabilities ? (100 * row.probabilities[row.label]).toFixed(1) + " %" : "");
  const cells = (row) => [String(row.row), ...Object.values(row.identifiers || {}), said(row), chance(row)];
  const head = ["row", ...Object.keys(rows[0].identifiers || {}), "answer", ""];
  const body = rows.slice(0, SHOWN).map((row) => {
    const line = make("tr", {}, ...cells(row).map((text) => make("td", { textContent: text })));
    if (row.refused) line.className = "warn";
    return line;
  });
  const found = make("table", {}, make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { textContent: text })))), make("tbody", {}, ...body));
  const more = rows.length - SHOWN;
  return make("div", { className: "wide" }, found, more > 0 ? make("p", { className: "quiet", textContent: "and " + more + " more rows" }) : "");
}

function columns(rows) {
  if (!rows) return "";
  const told = rows.schema.anyOf[0].properties.rows.items.properties;
  const lines = Object.entries(told).map(([name, schema]) =>
    make("tr", {}, make("td", {}, make("code", { textContent: name })), make("td", { textContent: about(schema) })));
  return make("details", {}, make("summary", { textContent: "Columns" }), make("div", { className: "wide" }, make("table", {}, make("tbody", {}, ...lines))));
}

function about(schema) {
  const levels = (schema.enum || schema.examples || []).filter((level) => level !== null);
  const more = levels.length > SHOWN ? " and " + (levels.length - SHOWN) + " more" : "";
  return (schema.description || "") + (levels.length ? " Levels: " + levels.slice(0, SHOWN).join(", ") + more + "." : "");
}

function command(name, content) {
  const [kind, own] = Object.entries(content)[0];
  const data = own.example ? "--data '" + JSON.stringify(own.example).replaceAll("'", "'\\''") + "'" : "--data-binary @FILE";
  const text = 'curl -H "Authorization: Bearer $TOKEN" -H "Content-Type: ' + kind + '" \\\n  ' + data + " \\\n  " + new URL("predict/" + name, document.baseURI);
  return make("details", {}, make("summary", { textContent: "On the command line" }), make("pre", { textContent: text }));
}

place("access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = place("token").value.trim();
  showModels();
});
showModels();
