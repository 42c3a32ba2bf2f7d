// Lists of tasks.

import { letGo, nearby } from "./images.js";

// Make the list's items those of the tasks, moving none that stays, so that focus stays too.
export function sync(list, tasks, create, update, heading) {
  const wanted = new Set(tasks.map((task) => task.id));
  const old = new Map();
  for (const item of [...list.children]) {
    if (wanted.has(item.dataset.id)) old.set(item.dataset.id, item);
    else remove(item, heading);
  }
  let at = list.firstElementChild;
  for (const task of tasks) {
    const item = old.get(task.id) ?? create(task);
    item.dataset.id = task.id;
    update(item, task);
    if (item === at) at = at.nextElementSibling;
    else list.insertBefore(item, at);
  }
}

function remove(item, heading) {
  const hadFocus = item.contains(document.activeElement);
  const neighbour = item.nextElementSibling ?? item.previousElementSibling;
  for (const image of item.querySelectorAll("img")) {
    nearby.unobserve(image);
    letGo(image);
  }
  item.remove();
  if (hadFocus) (neighbour?.querySelector("a") ?? heading).focus();
}
