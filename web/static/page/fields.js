// Fields: the rule of each in JSON Schema's words, its control, and the value that is read from it.

import { make } from "./dom.js";
import { labelOf } from "./words.js";

const MAX_TEXT = 10_000;
const SHORT_TEXT = 100; // Up to so many characters fit on a line.

// What a request may hold beside its prompt and model, where nothing is known of the model.
export const FIELDS = {
  width: { type: "integer", minimum: 128, maximum: 2048 },
  height: { type: "integer", minimum: 128, maximum: 2048 },
  negative_prompt: { type: "string", maxLength: MAX_TEXT },
  seed: { type: "integer", minimum: 0, maximum: 4_294_967_295 },
  num_inference_steps: { type: "integer", minimum: 1, maximum: 100 },
  guidance_scale: { type: "number", minimum: 0, maximum: 20 },
  true_cfg_scale: { type: "number", minimum: 0, maximum: 10 },
  priority: { type: "integer", minimum: -100, maximum: 100, default: 0 },
};
const PLACEHOLDERS = { negative_prompt: "what should not be there", seed: "any" };

// Return the rules of a model's fields, those of any where nothing is known of it.
export function rulesOf(model) {
  const { priority, ...any } = FIELDS;
  const sent = model?.send ?? {};
  const own = Object.entries(model?.fields ?? any);
  const complete = ([name, rule]) =>
    Object.hasOwn(sent, name) ? [name, { ...rule, default: sent[name] }] : [name, rule];
  return new Map([...own.map(complete), ["priority", priority]]);
}

export function promptRuleOf(model) {
  const { minLength = 1, maxLength = MAX_TEXT } = model?.prompt ?? {};
  return {
    type: "string",
    minLength: Math.max(1, minLength),
    maxLength: Math.min(MAX_TEXT, maxLength),
  };
}

const isText = ({ type }) => type === "string";
const isNumber = ({ type }) => type === "integer" || type === "number";

// Return the values that can be chosen among, or undefined where one is typed.
function choicesOf(rule) {
  if (rule.enum) return rule.enum.filter((value) => value !== null);
  return rule.type === "boolean" ? [true, false] : undefined;
}

export const isWide = (rule) =>
  !choicesOf(rule) && !isNumber(rule) && !(isText(rule) && rule.maxLength <= SHORT_TEXT);

// A value as it is typed.
export function textOf(value) {
  if (value == null) return "";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

// Controls

export function createControl(name, rule) {
  const choices = choicesOf(rule);
  const control = choices ? createSelect(rule, choices) : createInput(name, rule);
  control.id = `field-${name}`;
  control.dataset.field = name;
  return control;
}

function createSelect(rule, choices) {
  const usual = rule.default == null ? "default" : `${wordOf(rule.default)} (default)`;
  const options = [["", usual], ...choices.map((value) => [textOf(value), wordOf(value)])];
  return make(
    "select",
    {},
    ...options.map(([value, textContent]) => make("option", { value, textContent })),
  );
}

function wordOf(value) {
  if (typeof value === "boolean") return value ? "Yes" : "No";
  return textOf(value);
}

function createInput(name, rule) {
  const input = make(isWide(rule) ? "textarea" : "input");
  const usual = textOf(rule.default) || "the model's own";
  input.placeholder = Object.hasOwn(PLACEHOLDERS, name) ? PLACEHOLDERS[name] : usual;
  if (isWide(rule)) input.rows = 2;
  // The keys for digits alone lack a minus.
  else if (rule.minimum >= 0) input.inputMode = rule.type === "integer" ? "numeric" : "decimal";
  return input;
}

export function createField(name, control, rule) {
  const label = make("label", { htmlFor: control.id, textContent: labelOf(name) });
  const field = make("div", { className: isWide(rule) ? "field wide" : "field" }, label, control);
  const text = hintOf(rule);
  if (!text) return field;
  const hint = make("p", { id: `${control.id}-hint`, className: "hint", textContent: text });
  control.setAttribute("aria-describedby", hint.id);
  field.append(hint);
  return field;
}

function hintOf(rule) {
  if (choicesOf(rule)) return "";
  const usual = rule.default == null ? "" : `default ${textOf(rule.default)}`;
  const kind = isNumber(rule) || isText(rule) ? "" : "JSON";
  return [kind, isText(rule) ? lengthOf(rule) : rangeOf(rule), usual].filter(Boolean).join(", ");
}

function rangeOf({ minimum, maximum }) {
  if (minimum != null && maximum != null) return `${minimum} to ${maximum}`;
  if (minimum != null) return `at least ${minimum}`;
  return maximum == null ? "" : `at most ${maximum}`;
}

// Say how long a text is, where that is not what any may be.
export function lengthOf({ minLength = 0, maxLength = MAX_TEXT }) {
  const most = maxLength < MAX_TEXT ? maxLength : null;
  const range = rangeOf({ minimum: minLength > 1 ? minLength : null, maximum: most });
  return range && `${range} characters`;
}

// Values

// Return the value that was typed, null where none was, or throw what is wrong with it.
export function read(name, rule, text) {
  if (isText(rule) && !rule.enum) return readText(name, rule, text);
  const typed = text.trim();
  if (!typed) return null;
  const choices = choicesOf(rule);
  if (choices) return choices.find((value) => textOf(value) === typed) ?? null;
  return isNumber(rule) ? readNumber(name, rule, typed) : readJson(name, rule, typed);
}

function readNumber(name, rule, text) {
  const { type, minimum = -Infinity, maximum = Infinity } = rule;
  const isOne = /^[-+]?(\d+([.,]\d*)?|[.,]\d+)(e[-+]?\d+)?$/i.test(text);
  const value = isOne ? Number(text.replace(",", ".")) : NaN;
  const fits = type === "integer" ? Number.isInteger(value) : Number.isFinite(value);
  if (fits && value >= minimum && value <= maximum) return value;
  const kind = type === "integer" ? "a whole number" : "a number";
  const range = rangeOf(rule);
  const words = range && ` ${range.startsWith("at") ? "of" : "from"} ${range}`;
  throw new Error(`${labelOf(name)} must be ${kind}${words}`);
}

function readText(name, { minLength = 0, maxLength = MAX_TEXT }, text) {
  if (!text.trim()) {
    if (name === "prompt") throw new Error("Prompt must not be empty");
    return null;
  }
  const { length } = [...text];
  if (length >= minLength && length <= maxLength) return text;
  const [word, limit] = length < minLength ? ["least", minLength] : ["most", maxLength];
  throw new Error(`${labelOf(name)} must be at ${word} ${limit.toLocaleString()} characters long`);
}

function readJson(name, { type }, text) {
  try {
    const value = JSON.parse(text);
    if (!type || type === (Array.isArray(value) ? "array" : typeof value)) return value;
  } catch {
    if (!type) return text;
  }
  throw new Error(`${labelOf(name)} must be ${type === "array" ? "a list" : "an object"} in JSON`);
}
