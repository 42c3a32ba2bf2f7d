// What the page knows, and what has it look again.

import { api, endLongPoll, sentenceOf } from "./api.js";

export const LATEST_MS = 15_000; // So often the ended tasks are looked at, whatever happens.
export const FAILED_STEP = 5;
export const PENDING_STEP = 20;
export const PICTURES = "status=completed";
export const MOST_LISTED = 200; // As many as the API lists at once.

export const known = {
  queue: null,
  running: [],
  pending: [], // The next ones, as they are taken.
  pendingShown: PENDING_STEP,
  failed: [],
  failedShown: FAILED_STEP,
  followed: [], // What was submitted here, the newest first.
  filter: PICTURES, // Which tasks the gallery shows.
  pictures: [],
  morePictures: null, // The address of the next page, null at the end.
  opened: null, // The task that is shown large.
  isSearching: false,
  selected: new Set(), // The ids of pictures.
  lastMark: "",
  isDue: false, // Whether the ended tasks are to be looked at next.
  lastEnded: -LATEST_MS,
  isFirstLook: true,
  isAway: false,
};

export const awaited = new Set(); // The ids of tasks whose end is told.

export const isUnfinished = ({ status }) => status === "pending" || status === "processing";
export const isFailure = (task) => task.status === "failed" && task.error_code !== "canceled";

// Follow what was submitted here; what is done, and was seen to be, makes room for it.
export function follow(task) {
  const others = known.followed.filter((one) => isUnfinished(one) || isFailure(one));
  known.followed = [task, ...others];
  awaited.add(task.id);
}

export let isPoked = false;
let wake = () => {};

export function poke() {
  isPoked = true;
  endLongPoll();
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

// Look again, at the ended tasks too.
export function refresh() {
  known.isDue = true;
  poke();
}

// Return whether the task is deleted, and `fault` says why where it is not.
export async function deleteTask(fault, id) {
  if (!(await act(fault, "DELETE", `/tasks/${id}`))) return false;
  for (const list of ["pictures", "failed", "followed"]) {
    known[list] = known[list].filter((task) => task.id !== id);
  }
  return true;
}

// Return what was answered, or null where it failed and `fault` says why.
export async function act(fault, method, path) {
  fault.textContent = "";
  try {
    return (await api(method, path)) ?? true;
  } catch (error) {
    if (method === "DELETE" && error.status === 404) return true; // Someone else was quicker.
    fault.textContent = error.status ? error.message : `${sentenceOf(error)}; try again.`;
    return null;
  } finally {
    refresh();
  }
}
