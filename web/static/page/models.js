// The model that is asked: a field to type its name in, and a list that is searched meanwhile.

import { $, make } from "./dom.js";

const byName = new Map(); // The models by each of their names.
let sought = ""; // What the open list was searched for.
let all = [];
let areEditors = false; // Whether those are offered that edit pictures, or the others.

const offered = () => all.filter((model) => Boolean(model.images) === areEditors);

// Return the name of the default one.
function usual() {
  const isUsual = (model) => (areEditors ? model.default_edit : model.default);
  return (all.find(isUsual) ?? (areEditors ? offered()[0] : null))?.name ?? "";
}

// Return what is known of a model, the default one where no name is given.
export const modelOf = (name) => byName.get(name.trim() || usual());

// Offer those that edit pictures, or the others; where none was chosen, the default one changes.
export function offerEditors(areWanted) {
  if (areWanted === areEditors) return;
  const isChosen = !["", usual()].includes($("model").value.trim());
  areEditors = areWanted;
  if (!isChosen) setModel("");
}

// Take the models as the server lists them: of two with the same name, the first has it.
export function takeModels(models) {
  byName.clear();
  for (const model of models) {
    for (const name of [model.name, ...model.aliases]) {
      if (!byName.has(name)) byName.set(name, model);
    }
  }
  all = models;
  // What is being typed stays as it is.
  if (document.activeElement !== $("model")) setModel($("model").value);
  renderNote();
  if (isOpen()) openAgain();
}

export function setModel(name) {
  $("model").value = name.trim() || usual();
  renderNote();
}

function renderNote() {
  const { value } = $("model");
  const model = modelOf(value);
  const isUnknown = byName.size && value.trim() && !model;
  $("model-hint").textContent = isUnknown ? "not in the list" : "";
  if (model?.hot === false) $("model-hint").textContent = "cold: may take minutes";
}

// The list

const isOpen = () => !$("models").hidden;
const active = () => $("models").querySelector("[aria-selected=true]");

// Show the models whose names hold these words, or one by all of another of its names.
function open(text) {
  sought = text;
  const words = text.toLowerCase().split(/\s+/);
  const found = offered().filter(
    ({ name, aliases }) =>
      words.every((word) => name.toLowerCase().includes(word)) || aliases.includes(text.trim()),
  );
  $("models").replaceChildren(...found.map(createOption));
  show(Boolean(found.length));
}

function openAgain() {
  const name = active()?.dataset.name;
  open(sought);
  activateNamed(name);
}

function show(isShown) {
  activate(null);
  $("models").hidden = !isShown;
  $("model").setAttribute("aria-expanded", isShown);
  if (isShown) $("models").scrollIntoView({ block: "nearest" });
}

function createOption({ name, hot }, n) {
  const option = make("li", { id: `model-${n}`, role: "option", textContent: name });
  option.setAttribute("aria-selected", false);
  option.dataset.name = name;
  if (hot === false) option.append(" ", make("span", { className: "hint", textContent: "cold" }));
  return option;
}

function activate(option) {
  active()?.setAttribute("aria-selected", false);
  option?.setAttribute("aria-selected", true);
  option?.scrollIntoView({ block: "nearest" });
  if (option) $("model").setAttribute("aria-activedescendant", option.id);
  else $("model").removeAttribute("aria-activedescendant");
}

function openAll() {
  if (isOpen()) return;
  open("");
  $("model").select(); // What is typed next is searched for.
  const { name } = modelOf($("model").value) ?? {};
  activateNamed(name);
}

function activateNamed(name) {
  activate([...$("models").children].find((option) => option.dataset.name === name));
}

function choose(option) {
  $("model").value = option.dataset.name;
  $("model").dispatchEvent(new Event("input", { bubbles: true }));
  show(false);
}

function step(by) {
  const options = [...$("models").children];
  const at = options.indexOf(active());
  const next = at < 0 && by < 0 ? options.length - 1 : at + by;
  activate(options.at(next % options.length));
}

const KEYS = {
  ArrowDown: () => (isOpen() ? step(1) : openAll()),
  ArrowUp: () => (isOpen() ? step(-1) : openAll()),
  Enter: () => (active() ? choose(active()) : show(false)),
  Escape: () => show(false),
};

$("model").addEventListener("keydown", (event) => {
  const isForList = event.key.startsWith("Arrow") || isOpen();
  if (!isForList || !Object.hasOwn(KEYS, event.key) || event.isComposing) return;
  event.preventDefault();
  KEYS[event.key]();
});
$("model").addEventListener("click", openAll);
$("model").addEventListener("input", () => {
  open($("model").value);
  renderNote();
});
$("model").addEventListener("blur", () => {
  show(false);
  setModel($("model").value);
});
// Focus stays where the name is typed.
$("models").addEventListener("mousedown", (event) => event.preventDefault());
$("models").addEventListener("click", ({ target }) => {
  const option = target.closest("[role=option]");
  if (option) choose(option);
});
