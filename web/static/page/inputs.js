// The pictures that are to be edited: chosen, dropped, pasted, or taken from the page itself.

import { Refusal } from "./api.js";
import { $, button, make, say } from "./dom.js";
import { textOf } from "./fields.js";
import { fetchBlob, show } from "./images.js";
import { sync } from "./list.js";
import { modelOf, offerEditors, setModel } from "./models.js";
import { known } from "./state.js";
import { count } from "./words.js";

const TYPES = ["image/png", "image/jpeg", "image/webp"];

// Each has a `file`, the id of its `task`, or the `path` that its file comes from.
let inputs = [];
let added = 0; // Since the page was opened: what their ids are made of.
let named = []; // The names of those that were sent last, in the server's order.

export const hasInputs = () => inputs.length > 0;

// Return what tells these pictures from any others.
export const idsOfInputs = () => inputs.map(({ id }) => id);

// Add and remove

export function addFiles(files) {
  add([...files].map((file) => ({ name: file.name, file })));
}

export function addTask(task) {
  if (inputs.some((input) => input.task === task.id)) return;
  add([{ name: task.prompt, task: task.id, thumbnail: `${task.image.url}/thumbnail` }]);
}

// Put in what a task edited, in the place of all that is there.
export function useInputs(task) {
  inputs = [];
  const before = (task.inputs ?? []).map(({ url }, n) => (
    { name: `Picture ${n + 1}, as before`, path: url, thumbnail: url }
  ));
  if (before.length) add(before);
  else render();
}

function add(found) {
  offerEditors(true); // It is the model that says how many there may be.
  const faults = [];
  const names = [];
  for (const input of found) {
    const fault = faultOf(input);
    if (fault) faults.push(fault);
    else names.push(take(input));
  }
  render(faults.join(" "));
  if (names.length) say(`Added: ${names.join(", ")}`);
}

function faultOf({ name, file }) {
  if (file && !TYPES.includes(file.type)) return `${name} is no PNG, JPEG or WebP picture.`;
  const model = editor();
  if (inputs.length < (model?.images ?? Infinity)) return "";
  return `${name} was left out: ${mostOf(model)}.`;
}

function take(input) {
  const isTaken = (name) => inputs.some((other) => other.name === name);
  let { name } = input;
  for (let n = 2; isTaken(name); n += 1) name = `${input.name} (${n})`;
  added += 1;
  inputs.push({ ...input, name, id: String(added) });
  return name;
}

function remove({ id, name }) {
  inputs = inputs.filter((input) => input.id !== id);
  render();
  say(`Removed: ${name}`);
}

function removeAll() {
  inputs = [];
  render();
  say("The pictures were removed");
  $("images").focus();
}

// The model

// Return the model that the pictures go to, if that one takes any, or the default one.
function editor() {
  const model = modelOf($("model").value);
  return model?.images ? model : modelOf("");
}

const mostOf = ({ name, images }) => `${name} takes at most ${count(images, "picture", "pictures")}`;

// Return why the chosen model does not take these pictures, or "" where it may.
export function mismatch() {
  const model = modelOf($("model").value);
  if (!model || !hasInputs()) return "";
  if (!model.images) return `${model.name} takes no pictures.`;
  const surplus = inputs.length - model.images;
  return surplus > 0 ? `${mostOf(model)}: remove ${surplus}.` : "";
}

// Say whether pictures and model fit, and offer what to do where they do not.
export function renderFit() {
  const fault = mismatch();
  const model = modelOf($("model").value);
  const usual = modelOf("");
  const isLacking = !hasInputs() && model?.images;
  const sentence = fault || (isLacking ? `${model.name} edits pictures: add one.` : "");
  if (fault && fault !== $("fit").textContent) say(fault);
  $("fit").textContent = sentence;
  $("fit").classList.toggle("error", Boolean(fault));
  $("use-editor").hidden = !fault || usual === model || !(usual?.images >= inputs.length);
  $("use-editor").textContent = `Use ${usual?.name}`;
  $("remove-inputs").hidden = !fault;
}

// What is seen

function render(fault = "") {
  offerEditors(hasInputs());
  sync($("inputs"), inputs, createItem, () => {}, $("images"));
  $("inputs-error").textContent = fault;
  // The form hears of it as of anything else that is typed into it.
  $("images").dispatchEvent(new Event("input", { bubbles: true }));
}

function createItem(input) {
  const image = make("img", { alt: "", width: 48, height: 48 });
  if (input.file) image.src = URL.createObjectURL(input.file);
  else show(image, input.thumbnail);
  const name = make("span", { className: "name", textContent: input.name, dir: "auto" });
  const removal = button("Remove", () => remove(input));
  removal.setAttribute("aria-label", `Remove ${input.name}`);
  return make("li", {}, image, name, removal);
}

// What is sent

// Return a body with these fields and the pictures; a task's goes by its id.
export async function bodyWith(fields) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) body.append(name, textOf(value));
  const sent = [...inputs];
  $("inputs-error").textContent = ""; // What it tells of was left out.
  named = sent.map(({ name }) => name);
  for (const input of sent) body.append("images", input.task ?? (await fileOf(input)));
  return body;
}

async function fileOf(input) {
  try {
    input.file ??= await fetchBlob(input.path);
    await checkReadable(input.file);
    return input.file;
  } catch (error) {
    if (error instanceof TypeError) throw error; // Nobody answers.
    throw new Refusal(`${input.name} cannot be read: remove it, or add it again`, 400);
  }
}

// Throw an error where a file was changed since it was chosen, or deleted, which reads as empty.
async function checkReadable(file) {
  const { byteLength } = await file.slice(0, 1).arrayBuffer();
  if (!byteLength) throw new Error("There is nothing to read");
}

// Return the server's sentence with the name of the picture that it is about; else undefined.
export function sentenceAboutInputs(message) {
  const [, number, rest] = message.match(/^images(?:\[(\d+)\])? (.*)$/s) ?? [];
  if (!rest) return undefined;
  if (!number) return `The pictures ${rest}`;
  const why = rest.startsWith("names the task") ? "is no longer there" : rest;
  return `${named[number]} ${why}`;
}

// Chosen, dropped, pasted

const isDialogOpen = () => $("large").open || $("ask").open;

let dragged; // A task whose picture is dragged from the page itself.

function findDragged({ target }) {
  const id = target.closest?.("a")?.hash.slice(1);
  dragged = [...known.pictures, ...known.followed].find((task) => task.id === id && task.image);
}

function dragOver(event) {
  if (!dragged && !event.dataTransfer.types.includes("Files")) return;
  event.preventDefault(); // Else the browser opens what is dropped, and leaves the page.
  event.dataTransfer.dropEffect = isDialogOpen() ? "none" : "copy";
  $("make").classList.toggle("over", !isDialogOpen());
}

function drop(event) {
  $("make").classList.remove("over");
  if (!dragged && !event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  if (isDialogOpen()) return;
  if (dragged) addTask(dragged);
  else addFiles(event.dataTransfer.files);
}

function paste(event) {
  const { files, types } = event.clipboardData;
  const isText = event.target.matches("input, textarea") && types.includes("text/plain");
  if (!files.length || isText || isDialogOpen()) return;
  event.preventDefault();
  addFiles(files);
}

document.addEventListener("dragstart", findDragged);
document.addEventListener("dragend", () => {
  dragged = undefined;
});
document.addEventListener("dragover", dragOver);
document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) $("make").classList.remove("over");
});
document.addEventListener("drop", drop);
document.addEventListener("paste", paste);
$("images").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", () => {
  addFiles($("files").files);
  $("files").value = ""; // The same one may be chosen again.
});
$("remove-inputs").addEventListener("click", removeAll);
$("use-editor").addEventListener("click", () => {
  setModel("");
  render();
  $("model").focus();
});
