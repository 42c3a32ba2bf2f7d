// The form: what is asked for.

import { api, sentenceOf } from "./api.js";
import { $, make, say } from "./dom.js";
import { follow, poke } from "./state.js";
import { labelOf } from "./words.js";

const TWICE_MS = 1_000; // The same request again, so soon, is a slip of the finger.

// What a request may hold beside its prompt and model, in JSON Schema's words.
export const FIELDS = {
  width: { type: "integer", minimum: 128, maximum: 2048, default: 1024 },
  height: { type: "integer", minimum: 128, maximum: 2048, default: 1024 },
  negative_prompt: { type: "string", maxLength: 10_000 },
  seed: { type: "integer", minimum: 0, maximum: 4_294_967_295 },
  num_inference_steps: { type: "integer", minimum: 1, maximum: 100, default: 20 },
  guidance_scale: { type: "number", minimum: 0, maximum: 20, default: 7.5 },
  true_cfg_scale: { type: "number", minimum: 0, maximum: 10 },
  priority: { type: "integer", minimum: -100, maximum: 100, default: 0 },
};
const PROMPT = { type: "string", minLength: 1, maxLength: 10_000 };
const PLACEHOLDERS = {
  negative_prompt: "what should not be there",
  seed: "any",
  true_cfg_scale: "the model's own",
};

// Fields, and what is read from them

function createField(name) {
  const { type, default: usual } = FIELDS[name];
  const isText = type === "string";
  const input = make(isText ? "textarea" : "input", { id: name, name });
  input.placeholder = PLACEHOLDERS[name] ?? usual ?? "";
  if (isText) input.rows = 2;
  // The keys for digits alone lack a minus.
  else if (FIELDS[name].minimum >= 0) input.inputMode = type === "integer" ? "numeric" : "decimal";
  const label = make("label", { htmlFor: name, textContent: labelOf(name) });
  return make("div", { className: isText ? "field wide" : "field" }, label, input);
}

// Return the value that was typed, null where none was, or throw what is wrong with it.
function read(name, rule, typed) {
  if (rule.type === "string") return readText(name, rule, typed);
  const text = typed.trim();
  if (!text) return null;
  const isNumber = /^[-+]?(\d+([.,]\d*)?|[.,]\d+)(e[-+]?\d+)?$/i.test(text);
  const value = isNumber ? Number(text.replace(",", ".")) : NaN;
  const isWhole = rule.type === "integer";
  const fits = isWhole ? Number.isInteger(value) : Number.isFinite(value);
  if (fits && value >= rule.minimum && value <= rule.maximum) return value;
  const kind = isWhole ? "a whole number" : "a number";
  throw new Error(`${labelOf(name)} must be ${kind} from ${rule.minimum} to ${rule.maximum}`);
}

function readText(name, rule, text) {
  if (!text.trim()) {
    if (rule.minLength) throw new Error(`${labelOf(name)} must not be empty`);
    return null;
  }
  if ([...text].length > rule.maxLength) {
    const most = rule.maxLength.toLocaleString();
    throw new Error(`${labelOf(name)} must be at most ${most} characters long`);
  }
  return text;
}

// Return the fields of a request, and what is wrong with those that are wrong.
function readForm() {
  const fields = {};
  const faults = new Map();
  const [width, height] = $("size").value.split("x");
  const chosen = $("size").value ? { width, height } : {};
  for (const [name, rule] of Object.entries({ prompt: PROMPT, ...FIELDS })) {
    try {
      const value = read(name, rule, chosen[name] ?? $(name).value);
      if (value !== null) fields[name] = value;
    } catch (error) {
      faults.set(name, error.message);
    }
  }
  if ($("model").value.trim()) fields.model = $("model").value.trim();
  return { fields, faults };
}

// Submit

let lost = null; // A request whose answer was lost: it is sent again under the same key.
let isSending = false;
let sent = { body: "", at: -TWICE_MS };

async function submit(event) {
  event.preventDefault();
  const { fields, faults } = readForm();
  const body = JSON.stringify(fields);
  const isSlip = body === sent.body && performance.now() - sent.at < TWICE_MS;
  if (isSending || isSlip) return;
  showFaults(faults);
  if (faults.size) return;
  lost = lost?.body === body ? lost : { body, key: randomKey() };
  isSending = true;
  try {
    const headers = { "Idempotency-Key": lost.key };
    const added = await api("POST", "/generate", { body, headers });
    lost = null;
    sent = { body, at: performance.now() };
    follow({ ...added, prompt: fields.prompt });
    say("The picture is in the queue");
  } catch (error) {
    // Refused for good; after anything else the task may be there.
    if (error.status >= 400 && error.status < 500) lost = null;
    showRefusal(error);
  } finally {
    isSending = false;
    poke();
  }
}

function randomKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))]
    .map((byte) => byte.toString(16).padStart(2, "0"))
    .join("");
}

// What is wrong

function showRefusal(error) {
  if (!error.status) {
    const advice = "Press again: the picture is not made twice.";
    showFaults(new Map(), `${sentenceOf(error)}. ${advice}`);
    return;
  }
  const faults = error.status === 400 ? faultsOf(error.message) : new Map();
  showFaults(faults, faults.size ? "" : error.message);
}

// Take the server's sentences apart: each begins with the name of its field.
function faultsOf(message) {
  const names = ["prompt", "model", ...Object.keys(FIELDS)].join("|");
  const faults = new Map();
  for (const sentence of message.split(new RegExp(`; (?=(?:${names}) )`))) {
    const [, name, rest] = sentence.match(new RegExp(`^(${names})( .*)$`, "is")) ?? [];
    if (name) faults.set(name.toLowerCase(), labelOf(name.toLowerCase()) + rest);
  }
  return faults;
}

// Mark all fields that are wrong, and go to the first; `sentence` is about none of them.
function showFaults(faults, sentence = "") {
  for (const field of $("make").querySelectorAll("[aria-invalid]")) clearFault(field);
  const labels = [...faults.keys()].map(labelOf).join(", ");
  $("make-error").textContent = labels ? `Please correct: ${labels}` : sentence;
  for (const [name, fault] of faults) showFault($(name), fault);
  $("make").querySelector("[aria-invalid]")?.focus();
}

function showFault(field, sentence) {
  if ($("more").contains(field)) $("more").open = true;
  if ($("sides").contains(field)) $("size").value = "";
  chooseSize();
  const id = `${field.id}-error`;
  field.after(make("p", { id, className: "error", textContent: sentence }));
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", id);
}

function clearFault(field) {
  $(`${field.id}-error`)?.remove();
  field.removeAttribute("aria-invalid");
  field.removeAttribute("aria-describedby");
}

// Offer the models, the default one first.
export function offerModels(names) {
  $("models").replaceChildren(...names.map((value) => make("option", { value })));
  $("model").placeholder = names[0];
}

// Put in what was asked for: a default was not.
export function useAgain(task) {
  const usual = $("model").placeholder;
  $("prompt").value = task.prompt;
  $("model").value = task.model === usual ? "" : task.model;
  const asked = { ...task.params, priority: task.priority };
  for (const [name, rule] of Object.entries(FIELDS)) {
    $(name).value = asked[name] === rule.default ? "" : (asked[name] ?? "");
  }
  const { width = FIELDS.width.default, height = FIELDS.height.default } = asked;
  $("size").value = `${width}x${height}`;
  if ($("size").selectedIndex < 0) $("size").value = "";
  chooseSize();
  showFaults(new Map());
  $("more").open ||= [...$("fields").querySelectorAll("input, textarea")].some((one) => one.value);
  $("make").scrollIntoView({ block: "center" });
  $("prompt").focus();
}

function chooseSize() {
  $("sides").hidden = $("size").value !== "";
}

for (const name of Object.keys(FIELDS)) {
  $(name === "width" || name === "height" ? "sides" : "fields").append(createField(name));
}
$("make").addEventListener("submit", submit);
$("make").addEventListener("input", ({ target }) => {
  clearFault(target);
  if (!$("make").querySelector("[aria-invalid]")) $("make-error").textContent = "";
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
});
$("size").addEventListener("change", chooseSize);
