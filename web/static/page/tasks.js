// The tasks that wait or run, and those that failed.

import { clockAhead } from "./api.js";
import { $, askTwice, button, make, named } from "./dom.js";
import { useAgain } from "./form.js";
import { sync } from "./list.js";
import { act, FAILED_STEP, known, poke } from "./state.js";
import { lasting, moment } from "./words.js";

export function renderTasks() {
  const isLast = known.unfinished.length ? $("unfinished-title") : $("make-title");
  sync($("unfinished"), known.unfinished, createUnfinished, updateUnfinished, isLast);
  const more = known.queue.pending - known.unfinished.filter((t) => t.status === "pending").length;
  $("unfinished-more").textContent =
    more > 0 ? `${more.toLocaleString()} more wait, before the last ones, which are shown here` : "";
  $("unfinished-part").hidden = !known.unfinished.length;
  const failed = known.failed.slice(0, known.failedShown);
  sync($("failed"), failed, createFailed, updateFailed, $("make-title"));
  $("failed-part").hidden = !failed.length;
  $("failed-more").hidden = known.failed.length <= known.failedShown;
  $("retry-all").hidden = !known.failed.some((task) => !task.retried_as);
}

function createUnfinished(task) {
  const cancel = () => act($("unfinished-error"), "POST", `/tasks/${task.id}/cancel`);
  const prompt = make("p", { className: "prompt", textContent: task.prompt });
  const row = make("div", { className: "row" }, button("Cancel", cancel));
  named(row, prompt, task);
  return make("li", {}, prompt, make("p", { className: "state" }), row);
}

function updateUnfinished(item, task) {
  const state = item.querySelector(".state");
  const isRunning = task.status === "processing";
  item.classList.toggle("running", isRunning);
  delete item.dataset.started;
  if (!isRunning) {
    const place = task.queue_position ? `Waits at place ${task.queue_position}` : "Waits";
    state.textContent = `${place}: ${task.waiting_for}`;
    return;
  }
  item.dataset.started = task.started_at;
  tick(item);
}

function tick(item) {
  const seconds = (Date.now() + clockAhead - moment(item.dataset.started)) / 1000;
  item.querySelector(".state").textContent = `Running for ${lasting(Math.max(0, seconds))}`;
}

function createFailed(task) {
  const path = `/tasks/${task.id}`;
  const retry = async (pressed) => {
    pressed.disabled = true; // A second press would pay for a second picture.
    pressed.disabled = Boolean(await act($("failed-error"), "POST", `${path}/retry`));
  };
  const remove = () => act($("failed-error"), "DELETE", path);
  const row = make(
    "div",
    { className: "row" },
    button("Retry", retry, "small retry"),
    button("Use again", () => useAgain(task)),
    askTwice(button("Delete", null, "small danger"), remove),
  );
  const prompt = make("a", { className: "prompt", textContent: task.prompt, href: `#${task.id}` });
  named(row, prompt, task);
  return make("li", {}, prompt, make("p", { className: "state failed" }), row);
}

function updateFailed(item, task) {
  const retried = task.retried_as ? " (It was retried.)" : "";
  item.querySelector(".state").textContent = `${task.error}${retried}`;
  item.querySelector(".retry").hidden = Boolean(task.retried_as);
}

setInterval(() => {
  if (!document.hidden) document.querySelectorAll("[data-started]").forEach(tick);
}, 1000);
$("retry-all").addEventListener("click", () => act($("failed-error"), "POST", "/tasks/retry"));
$("failed-more").addEventListener("click", () => {
  known.failedShown = Math.min(known.failedShown + FAILED_STEP, 199);
  known.lastMark = "";
  poke();
});
