// The form: what is asked for.

import { api } from "./api.js";
import { $, make, say } from "./dom.js";
import { awaited, known, poke } from "./state.js";

const TWICE_MS = 1_000; // The same request again, so soon, is a slip of the finger.

let lost = null; // A request whose answer was lost: it is sent again under the same key.
let isSending = false;
let sent = { body: "", at: -TWICE_MS };

async function submit(event) {
  event.preventDefault();
  const body = JSON.stringify(formFields());
  const isSlip = body === sent.body && performance.now() - sent.at < TWICE_MS;
  if (isSending || isSlip) return;
  lost = lost?.body === body ? lost : { body, key: randomKey() };
  isSending = true;
  showFault("");
  try {
    const headers = { "Idempotency-Key": lost.key };
    awaited.add((await api("POST", "/generate", { body, headers })).id);
    lost = null;
    sent = { body, at: performance.now() };
    known.lastMark = "";
    $("make-note").textContent = "It is in the queue.";
    say("The picture is in the queue");
  } catch (error) {
    // Refused for good; after anything else the task may be there.
    if (error.status >= 400 && error.status < 500) lost = null;
    showFault(
      error.status
        ? error.message
        : "The server does not answer. Press again: the picture is not made twice.",
    );
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

const NUMBERS = ["seed", "num_inference_steps", "guidance_scale", "true_cfg_scale", "priority"];

// A number as it was typed, where it is none: the server's refusal names the field and the rule.
function number(text) {
  return /^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?$/i.test(text) ? Number(text) : text;
}

function formFields() {
  const fields = { prompt: $("prompt").value };
  const sides = $("size").value.split("x");
  const [width, height] = sides.length === 2 ? sides : [$("width").value, $("height").value];
  const typed = { width, height };
  for (const name of NUMBERS) typed[name] = $(name).value;
  for (const [name, text] of Object.entries(typed)) {
    if (text.trim()) fields[name] = number(text.trim());
  }
  if ($("model").value.trim()) fields.model = $("model").value.trim();
  if ($("negative_prompt").value.trim()) fields.negative_prompt = $("negative_prompt").value;
  return fields;
}

// Show what is wrong, at the field that the server's sentence begins with.
function showFault(sentence) {
  $("make-error").textContent = sentence;
  $("make-note").textContent = "";
  for (const field of $("make").querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
  const name = sentence.split(" ")[0].toLowerCase();
  const field = $("make").elements.namedItem(name);
  if (!name || !field) return;
  if ($("more").contains(field)) $("more").open = true;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", "make-error");
  field.focus();
}

export function useAgain(task) {
  $("prompt").value = task.prompt;
  $("model").value = task.model;
  $("negative_prompt").value = task.params.negative_prompt ?? "";
  const used = { ...task.params, priority: task.priority || "" };
  for (const name of NUMBERS) $(name).value = used[name] ?? "";
  $("width").value = task.params.width;
  $("height").value = task.params.height;
  $("size").value = `${task.params.width}x${task.params.height}`;
  if ($("size").selectedIndex < 0) $("size").value = "";
  chooseSize();
  showFault("");
  $("more").open ||= [...$("more").querySelectorAll("input, textarea")].some((one) => one.value);
  $("make").scrollIntoView({ block: "center" });
  $("prompt").focus();
}

function chooseSize() {
  $("sides").hidden = $("size").value !== "";
}

$("make").addEventListener("submit", submit);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
});
$("size").addEventListener("change", chooseSize);
api("GET", "/v1/models")
  .then(({ data }) => {
    $("models").replaceChildren(...data.map(({ id }) => make("option", { value: id })));
    $("model").placeholder = data[0].id;
  })
  .catch(() => {});
