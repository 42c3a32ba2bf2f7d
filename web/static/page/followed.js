// What was submitted here, followed to its end where it was submitted.

import { $, button, make } from "./dom.js";
import { show } from "./images.js";
import { sync } from "./list.js";
import { act, follow, isFailure, isUnfinished, known } from "./state.js";
import { buttonsOf, createTask, updateTask } from "./tasks.js";

const KEPT = "followed"; // Where they are found again when the tab is loaded anew.
const MOST_KEPT = 10;

export function renderFollowed() {
  const create = (task) => createTask(task, $("make-error"));
  // What failed must not scroll out of sight.
  const failed = known.followed.filter(isFailure);
  const others = known.followed.filter((task) => !isFailure(task));
  sync($("followed"), [...failed, ...others], create, update, $("make-title"));
  keep();
}

function update(item, task) {
  updateTask(item, task, buttons);
  item.firstChild.textContent = task.prompt;
  if (!task.image || item.querySelector(".thumbnail")) return;
  const image = make("img", { alt: "", width: 64, height: 64 });
  const link = make("a", { className: "thumbnail", href: `#${task.id}` }, image);
  link.setAttribute("aria-label", "Open the picture");
  item.append(link);
  show(image, `${task.image.url}/thumbnail`);
}

function buttons(task, fault) {
  if (isUnfinished(task)) return buttonsOf(task, fault);
  const dismissal = button("Dismiss", () => dismiss(task));
  if (task.status === "completed") return [dismissal];
  const retry = button("Retry", async (pressed) => {
    pressed.disabled = true; // A second press would pay for a second picture.
    const added = await act(fault, "POST", `/tasks/${task.id}/retry`);
    pressed.disabled = Boolean(added);
    if (!added) return;
    dismiss(task);
    follow({ ...added, prompt: task.prompt });
  });
  const [again] = buttonsOf(task, fault).filter((one) => one.textContent === "Use again");
  return task.retried_as ? [again, dismissal] : [retry, again, dismissal];
}

function dismiss(task) {
  known.followed = known.followed.filter(({ id }) => id !== task.id);
  renderFollowed();
}

function keep() {
  const ids = known.followed
    .filter((task) => isUnfinished(task) || isFailure(task))
    .map((task) => task.id);
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(ids.slice(0, MOST_KEPT)));
  } catch {
    // Then a reload finds none of them.
  }
}

function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");
  } catch {
    return [];
  }
}

// How they stand is asked before they are shown.
known.followed = kept().map((id) => ({ id, prompt: "", status: "pending" }));
