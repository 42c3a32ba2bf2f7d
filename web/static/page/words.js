// What a person reads: times, durations, and words for those of the API.

import { clockAhead } from "./api.js";

const LABELS = {
  __proto__: null,
  images: "Pictures to edit",
  num_inference_steps: "Steps",
  true_cfg_scale: "True CFG scale",
};

// Why a task failed; what was canceled did not, for a person.
export const FAILURES = {
  upstream_rejected: "Chutes refused the request",
  upstream_error: "Chutes failed",
  upstream_timeout: "It took too long",
  upstream_truncated: "The image was cut short",
  not_an_image: "No image came",
  image_too_large: "The image was too large",
  upstream_auth: "Chutes refused the token",
  upstream_payment: "Chutes wants payment",
  expired: "It waited too long",
  interrupted: "The server stopped",
  storage: "It could not be stored",
  internal: "A bug in this server",
};

const OUTCOMES = { ...FAILURES, completed: "Completed", canceled: "Canceled" };

export function labelOf(field) {
  const words = field.replaceAll("_", " ");
  return LABELS[field] ?? words[0].toUpperCase() + words.slice(1);
}

export function outcomeOf(call) {
  if (!call.outcome) return "Under way";
  return OUTCOMES[call.outcome] ?? call.outcome.replaceAll("_", " ");
}

// Times come in UTC, and are read in the reader's zone.

const OF_TODAY = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const DATED = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

export const moment = (text) => Date.parse(`${text.replace(" ", "T")}Z`);

export function when(text) {
  const then = new Date(moment(text));
  const isToday = then.toDateString() === new Date().toDateString();
  return (isToday ? OF_TODAY : DATED).format(then);
}

// A sentence of the server's, with the times in it as all others are.
export function inLocalTime(sentence) {
  const today = new Date(Date.now() + clockAhead).toISOString().slice(0, 10);
  return sentence.replace(
    /(?:(\d{4}-\d\d-\d\d) )?(\d\d:\d\d:\d\d) UTC/g,
    (_, date, time) => when(`${date ?? today} ${time}`),
  );
}

export function lasting(seconds) {
  const whole = Math.round(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

export function count(number, one, many) {
  return `${number.toLocaleString()} ${number === 1 ? one : many}`;
}
