// The settings: the fields of the model that is asked, and what was typed for any.

import { $ } from "./dom.js";
import { createControl, createField, isWide, read, rulesOf, textOf } from "./fields.js";

const SIDES = ["width", "height"]; // Where a model has both, they are chosen as one size.
const OTHER = "other"; // The size whose sides are typed.
const SHAPES = [...SIDES, "size", "resolution", "aspect_ratio"]; // They stand before the rest.

let rules = new Map();
const controls = new Map();
const typed = new Map(); // It is kept while a model without such a field is chosen.

const areSides = () => SIDES.every((name) => rules.has(name));
const areSidesTyped = () => !areSides() || $("size").value === OTHER;

export const controlOf = (name) => controls.get(name);
export const fieldNames = () => [...rules.keys()];

// Show the fields of a model, with what was typed for them; return whether they are others.
export function showFields(model) {
  const before = JSON.stringify([...rules]);
  rules = rulesOf(model);
  if (JSON.stringify([...rules]) === before) return false;
  controls.clear();
  $("shape").replaceChildren();
  $("fields").replaceChildren();
  const inOrder = [...rules.keys()].sort((one, other) => rank(one) - rank(other));
  for (const name of inOrder) {
    controls.set(name, createControl(name, rules.get(name)));
    const field = createField(name, controls.get(name), rules.get(name));
    $(rank(name) ? "fields" : "shape").append(field);
  }
  offerSizes();
  fillIn();
  return true;
}

// What makes the shape comes first, then long texts, then the rest as the model has it.
function rank(name) {
  if (SHAPES.includes(name)) return 0;
  return isWide(rules.get(name)) ? 1 : 2;
}

function fillIn() {
  for (const [name, control] of controls) {
    control.value = typed.get(name) ?? "";
    if (control.selectedIndex < 0) control.selectedIndex = 0;
  }
  renderSize();
  renderSeed();
}

// Call `take` with the name and the value of each field that was filled in, or `fault` with the
// name and what is wrong.
export function readFields(take, fault) {
  const texts = new Map([...controls].map(([name, control]) => [name, control.value]));
  if (!areSidesTyped()) sidesOf($("size").value).forEach((side, n) => texts.set(SIDES[n], side));
  for (const [name, text] of texts) {
    try {
      const value = read(name, rules.get(name), text);
      if (value !== null) take(name, value);
    } catch (error) {
      fault(name, error.message);
    }
  }
}

// The size

const sidesOf = (size) => (size ? size.split("x") : ["", ""]);

function offerSizes() {
  const usual = SIDES.map((name) => textOf(rules.get(name)?.default));
  const isKnown = usual.every(Boolean);
  for (const option of $("size").options) {
    if (!option.value) option.text = isKnown ? `${usual.join(" × ")} (default)` : "default";
    if (!option.value || option.value === OTHER) continue;
    option.hidden = option.value === usual.join("x");
    const fits = (side, n) => isWithin(rules.get(SIDES[n]), side);
    option.disabled = !sidesOf(option.value).every(fits);
  }
}

function isWithin({ minimum = 0, maximum = Infinity } = {}, side) {
  return minimum <= side && side <= maximum;
}

function renderSize() {
  $("size").parentElement.hidden = !areSides();
  for (const name of SIDES) {
    const field = controls.get(name)?.parentElement;
    if (field) field.hidden = !areSidesTyped();
  }
}

// Show a field, wherever it is: the sides of a size that was chosen are typed from now on.
export function reveal(field) {
  if ($("more").contains(field)) $("more").open = true;
  if (!SIDES.includes(field.dataset.field) || areSidesTyped()) return;
  sidesOf($("size").value).forEach((side, n) => typed.set(SIDES[n], side));
  $("size").value = OTHER;
  fillIn();
}

// What was asked for before

let seedBefore; // Of the task that is used again: nothing tells whether it was asked for.

// Put in what was asked for, and the seed only when that is asked for, too: a default was not.
export function useSettings(asked) {
  const { seed, ...others } = asked;
  seedBefore = seed;
  typed.clear();
  for (const [name, value] of Object.entries(others)) {
    const text = textOf(value);
    if (text !== textOf(rules.get(name)?.default)) typed.set(name, text);
  }
  const isUsual = SIDES.every((name) => !typed.has(name));
  $("size").value = isUsual ? "" : SIDES.map((name) => textOf(asked[name])).join("x");
  if ($("size").selectedIndex < 0) $("size").value = OTHER;
  fillIn();
  $("more").open ||= [...$("fields").querySelectorAll("[data-field]")].some((one) => one.value);
}

function renderSeed() {
  $("seed-before").hidden = seedBefore == null || !rules.has("seed");
  $("seed-before").textContent = `Use its seed too: ${seedBefore}`;
}

$("seed-before").addEventListener("click", () => {
  typed.set("seed", textOf(seedBefore));
  seedBefore = null;
  fillIn();
  reveal(controls.get("seed"));
  controls.get("seed").focus();
});
$("size").addEventListener("change", renderSize);
$("make").addEventListener("input", ({ target }) => {
  if (target.dataset.field) typed.set(target.dataset.field, target.value);
});
