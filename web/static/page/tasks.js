// Tasks in lists: those that run or wait, and those that failed.

import { api, clockAhead, sentenceOf } from "./api.js";
import { showInput } from "./before.js";
import { $, askTwice, button, make, say } from "./dom.js";
import { useAgain } from "./form.js";
import { sync } from "./list.js";
import {
  act, deleteTask, FAILED_STEP, isFailure, isUnfinished, known, MOST_LISTED, PENDING_STEP, refresh,
} from "./state.js";
import { count, FAILURES, inLocalTime, lasting, moment } from "./words.js";

export function renderTasks() {
  const { running, pending, queue } = known;
  const unfinished = [...running, ...pending];
  const heading = unfinished.length ? $("unfinished-title") : $("make-title");
  const create = (task) => createTask(task, $("unfinished-error"));
  sync($("unfinished"), unfinished, create, updateTask, heading);
  $("unfinished-part").hidden = !unfinished.length;
  const more = queue.pending - pending.length;
  $("unfinished-more").textContent = more > 0 ? `${count(more, "waits", "wait")} after these` : "";
  $("pending-more").hidden = more <= 0 || known.pendingShown >= MOST_LISTED;
  renderCancelAll();
  const failed = known.failed.slice(0, known.failedShown);
  const createFailed = (task) => createTask(task, $("failed-error"));
  sync($("failed"), failed, createFailed, updateTask, $("make-title"));
  $("failed-part").hidden = !failed.length;
  $("failed-more").hidden = known.failed.length <= known.failedShown;
  $("retry-all").hidden = !known.failed.some((task) => !task.retried_as);
}

// What is canceled may be narrowed to one of the models that wait.
function renderCancelAll() {
  $("cancel-all").hidden = known.queue.pending < 2;
  const models = [...new Set(known.pending.map((task) => task.model))].sort();
  const chosen = $("cancel-model").value;
  if (chosen && !models.includes(chosen)) models.push(chosen);
  $("cancel-model").hidden = $("cancel-all").hidden || models.length < 2;
  const options = ["", ...models].map((value) => [value, value || "all models"]);
  setOptions($("cancel-model"), options);
}

// Offer values with their names, and keep the choice.
export function setOptions(select, options) {
  if (JSON.stringify(options) === select.dataset.options) return;
  const chosen = select.value;
  select.dataset.options = JSON.stringify(options);
  select.replaceChildren(
    ...options.map(([value, textContent]) => make("option", { value, textContent })),
  );
  select.value = chosen;
  if (select.selectedIndex < 0) select.selectedIndex = 0;
}

export function createTask(task, fault) {
  const prompt = make("a", { className: "prompt", textContent: task.prompt, href: `#${task.id}` });
  prompt.dir = "auto";
  const item = make("li", {}, prompt, make("p", { className: "state" }));
  item.append(make("div", { className: "row" }));
  item.fault = fault;
  return item;
}

export function updateTask(item, task, buttons = buttonsOf) {
  showState(item, task);
  showInput(item, task);
  const kind = `${task.status} ${task.retried_as}`;
  if (item.dataset.kind === kind) return;
  item.dataset.kind = kind;
  const [prompt, , row] = item.children;
  const hadFocus = row.contains(document.activeElement);
  row.replaceChildren(...buttons(task, item.fault));
  prompt.id = `${item.fault.id}-${task.id}`;
  for (const one of row.children) one.setAttribute("aria-describedby", prompt.id);
  if (hadFocus) prompt.focus();
}

export function buttonsOf(task, fault) {
  const path = `/tasks/${task.id}`;
  if (isUnfinished(task)) return [button("Cancel", () => act(fault, "POST", `${path}/cancel`))];
  const retry = async (pressed) => {
    pressed.disabled = true; // A second press would pay for a second picture.
    pressed.disabled = Boolean(await act(fault, "POST", `${path}/retry`));
  };
  const remove = () => deleteTask(fault, task.id);
  return [
    ...(task.retried_as ? [] : [button("Retry", retry, "small retry")]),
    button("Use again", () => useAgain(task)),
    askTwice(button("Delete", null, "small danger"), remove),
  ];
}

// Write into an element with a `.state` how a task stands.
export function showState(element, task) {
  element.classList.toggle("running", task.status === "processing");
  element.classList.toggle("under-way", isUnfinished(task));
  element.classList.toggle("bad", isFailure(task));
  delete element.dataset.started;
  if (task.status === "processing") {
    element.dataset.started = task.started_at;
    tick(element);
    return;
  }
  element.querySelector(".state").textContent = stateOf(task);
}

function stateOf(task) {
  if (task.status === "pending") {
    const place = task.queue_position ? `, place ${task.queue_position}` : "";
    return `Waiting${place}${task.waiting_for ? `: ${inLocalTime(task.waiting_for)}` : ""}`;
  }
  if (task.status === "completed") return "Done";
  const retried = task.retried_as ? " (It was retried.)" : "";
  return isFailure(task) ? `${inLocalTime(task.error)}${retried}` : `Canceled${retried}`;
}

function tick(element) {
  const seconds = (Date.now() + clockAhead - moment(element.dataset.started)) / 1000;
  element.querySelector(".state").textContent = `Running for ${lasting(Math.max(0, seconds))}`;
}

// Return up to `limit` tasks that failed, the newest first, and none that was canceled.
export async function listFailed(limit) {
  const newest = await api("GET", `/tasks?status=failed&limit=${limit}`);
  const failed = newest.tasks.filter(isFailure);
  if (failed.length === newest.tasks.length || !newest.next) return failed;
  const found = [];
  for (const code of Object.keys(FAILURES)) {
    found.push(...(await api("GET", `/tasks?status=failed&error_code=${code}&limit=${limit}`)).tasks);
  }
  return found.sort((a, b) => b.created_at.localeCompare(a.created_at)).slice(0, limit);
}

// Return how many a POST to the path would mean, or nothing where `fault` says why.
async function countOf(path, fault) {
  fault.textContent = "";
  try {
    return (await api("GET", path)).count;
  } catch (error) {
    fault.textContent = sentenceOf(error);
    return 0;
  }
}

function cancelPath() {
  const model = $("cancel-model").value;
  return `/tasks/cancel${model && `?model=${encodeURIComponent(model)}`}`;
}

setInterval(() => {
  if (!document.hidden) document.querySelectorAll("[data-started]").forEach(tick);
}, 1000);
askTwice(
  $("cancel-all"),
  async () => {
    const done = await act($("unfinished-error"), "POST", cancelPath());
    if (done) say(`${done.canceled.toLocaleString()} canceled`);
  },
  async () => {
    const model = $("cancel-model").value;
    const number = await countOf(cancelPath(), $("unfinished-error"));
    const which = `${number.toLocaleString()}${model && ` of ${model}`}`;
    return number ? `Really cancel all ${which}?` : "";
  },
);
askTwice(
  $("retry-all"),
  async () => {
    const done = await act($("failed-error"), "POST", "/tasks/retry");
    if (done) say(`${count(done.retried, "is", "are")} made again`);
  },
  async () => {
    const number = await countOf("/tasks/retry", $("failed-error"));
    return number ? `Really make ${count(number, "picture", "pictures")} again?` : "";
  },
);
$("pending-more").addEventListener("click", () => {
  known.pendingShown = Math.min(known.pendingShown + 2 * PENDING_STEP, MOST_LISTED);
  refresh();
});
$("failed-more").addEventListener("click", () => {
  known.failedShown = Math.min(known.failedShown + FAILED_STEP, MOST_LISTED - 1);
  refresh();
});
