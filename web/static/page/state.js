// What the page knows, and what has it look again.

import { api } from "./api.js";

export const LATEST_MS = 15_000; // So often the ended tasks are looked at, whatever happens.
export const FAILED_STEP = 5;

export const known = {
  queue: null,
  unfinished: [],
  failed: [],
  failedShown: FAILED_STEP,
  pictures: [],
  morePictures: null, // The address of the next page, null at the end.
  lastMark: "",
  lastEnded: -LATEST_MS,
  isFirstLook: true,
  isAway: false,
};

export const awaited = new Set(); // The ids of tasks whose end is told.

export let isPoked = false;
let wake = () => {};

export function poke() {
  isPoked = true;
  wake();
}

export function beCalm() {
  isPoked = false;
}

export function sleep(milliseconds) {
  if (isPoked) return Promise.resolve();
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    wake = () => {
      clearTimeout(timer);
      resolve();
    };
  });
}

export async function act(fault, method, path) {
  fault.textContent = "";
  try {
    const told = await api(method, path);
    known.lastMark = "";
    poke();
    return told ?? true;
  } catch (error) {
    poke();
    if (method === "DELETE" && error.status === 404) return true; // Someone else was quicker.
    fault.textContent = error.status ? error.message : "The server does not answer; try again.";
    return null;
  }
}
