// The form: what is asked for.

import { api, sentenceOf } from "./api.js";
import { $, make, say } from "./dom.js";
import { lengthOf, promptRuleOf, read } from "./fields.js";
import {
  addTask, bodyWith, hasInputs, idsOfInputs, mismatch, renderFit, sentenceAboutInputs, useInputs,
} from "./inputs.js";
import { modelOf, setModel, takeModels } from "./models.js";
import { controlOf, fieldNames, readFields, reveal, showFields, useSettings } from "./settings.js";
import { follow, poke } from "./state.js";
import { labelOf } from "./words.js";

const TWICE_MS = 1_000; // The same request again, so soon, is a slip of the finger.

// Return the fields of a request, and what is wrong with those that are wrong.
function readForm() {
  const fields = new Map();
  const faults = new Map();
  const model = $("model").value.trim();
  try {
    fields.set("prompt", read("prompt", promptRuleOf(modelOf(model)), $("prompt").value));
  } catch (error) {
    faults.set("prompt", error.message);
  }
  readFields(
    (name, value) => fields.set(name, value),
    (name, sentence) => faults.set(name, sentence),
  );
  if (mismatch()) faults.set("images", mismatch());
  const isLeftOut = hasInputs() && modelOf(model)?.default_edit;
  if (model && !isLeftOut) fields.set("model", model);
  return { fields: Object.fromEntries(fields), faults };
}

// Submit

let lost = null; // A request whose answer was lost: it is sent again under the same key.
let isSending = false;
let sent = { asked: "", at: -TWICE_MS };

async function submit(event) {
  event.preventDefault();
  const { fields, faults } = readForm();
  const body = JSON.stringify(fields);
  const asked = body + idsOfInputs();
  const isSlip = asked === sent.asked && performance.now() - sent.at < TWICE_MS;
  if (isSending || isSlip) return;
  showFaults(faults);
  if (faults.size) return;
  lost = lost?.asked === asked ? lost : { asked, key: randomKey() };
  showSending(true);
  try {
    const headers = { "Idempotency-Key": lost.key };
    const added = hasInputs()
      ? await api("POST", "/edit", { body: await bodyWith(fields), headers })
      : await api("POST", "/generate", { body, headers });
    lost = null;
    sent = { asked, at: performance.now() };
    follow({ ...added, prompt: fields.prompt });
    say("The picture is in the queue");
  } catch (error) {
    // Refused for good; after anything else the task may be there.
    if (error.status >= 400 && error.status < 500) lost = null;
    showRefusal(error);
  } finally {
    showSending(false);
    poke();
  }
}

// The button keeps its focus; with pictures it may take a while.
function showSending(isOn) {
  isSending = isOn;
  const isUpload = isOn && hasInputs();
  $("submit").setAttribute("aria-disabled", isUpload);
  $("submit").textContent = isUpload ? "Sending the pictures…" : "Make the picture";
  if (isUpload) say("Sending the pictures");
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
  const sentence = sentenceAboutInputs(error.message);
  if (sentence) faults.set("images", sentence);
  showFaults(faults, faults.size ? "" : error.message);
}

// Take the server's sentences apart: each begins with the name of its field.
function faultsOf(message) {
  const escaped = fieldNames().map((name) => name.replace(/[^\w]/g, "\\$&"));
  const names = ["prompt", "model", ...escaped].join("|");
  const faults = new Map();
  for (const sentence of message.split(new RegExp(`; (?=(?:${names}) )`))) {
    const [, name, rest] = sentence.match(new RegExp(`^(${names})( .*)$`, "is")) ?? [];
    const known = controlOf(name) ? name : name?.toLowerCase();
    if (name) faults.set(known, labelOf(known) + rest);
  }
  return faults;
}

// Mark all fields that are wrong, and go to the first; `sentence` is about none of them.
function showFaults(faults, sentence = "") {
  for (const field of $("make").querySelectorAll("[aria-invalid]")) clearFault(field);
  const labels = [...faults.keys()].map(labelOf).join(", ");
  $("make-error").textContent = labels ? `Please correct: ${labels}` : sentence;
  for (const [name, fault] of faults) showFault(controlOf(name) ?? $(name), fault);
  $("make").querySelector("[aria-invalid]")?.focus();
}

function showFault(field, sentence) {
  reveal(field);
  const id = `${field.id}-error`;
  field.after(make("p", { id, className: "error", textContent: sentence }));
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", id);
}

function clearFault(field) {
  $(`${field.id}-error`)?.remove();
  field.removeAttribute("aria-invalid");
  if ($(`${field.id}-hint`)) field.setAttribute("aria-describedby", `${field.id}-hint`);
  else field.removeAttribute("aria-describedby");
}

function settle() {
  if (!$("make").querySelector("[aria-invalid]")) $("make-error").textContent = "";
}

// What the chosen model takes

export function offerModels(models) {
  takeModels(models);
  showModel();
}

function showModel() {
  const model = modelOf($("model").value);
  $("prompt-hint").textContent = lengthOf(promptRuleOf(model));
  renderFit();
  if (showFields(model)) settle();
}

export function useAgain(task) {
  $("prompt").value = task.prompt;
  useInputs(task);
  setModel(task.model);
  showModel();
  useSettings({ ...task.params, priority: task.priority });
  showFaults(new Map());
  goTo();
}

// Put the picture of a task into the form, to be edited.
export function edit(task) {
  addTask(task);
  goTo();
}

function goTo() {
  $("make").scrollIntoView({ block: "center" });
  $("prompt").focus();
}

showModel();
$("make").addEventListener("submit", submit);
for (const id of ["model", "images"]) $(id).addEventListener("input", showModel);
$("make").addEventListener("input", ({ target }) => {
  clearFault(target);
  if (target === $("model")) clearFault($("images")); // It may not have taken them.
  settle();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
});
