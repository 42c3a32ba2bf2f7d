// The gallery: what is being made and the pictures, or what was searched for.

import { api } from "./api.js";
import { markEdit } from "./before.js";
import { $, make, say } from "./dom.js";
import { nearby } from "./images.js";
import { sync } from "./list.js";
import { isUnfinished, known, MOST_LISTED, PICTURES, poke } from "./state.js";
import { isSelecting, renderTaking } from "./take.js";
import { showState } from "./tasks.js";

const PICTURES_STEP = 40;

const isFiltered = () => known.filter !== PICTURES;

export function renderGallery() {
  const ended = new Set(known.pictures.map((task) => task.id));
  const tasks = [...beingMade().filter((task) => !ended.has(task.id)), ...known.pictures];
  sync($("pictures"), tasks, createTile, updateTile, $("pictures-title"));
  $("empty").hidden = Boolean(tasks.length) || isFiltered();
  $("none").hidden = Boolean(tasks.length) || !isFiltered() || known.isSearching;
  $("end").textContent = known.morePictures ? "More…" : "";
  renderTaking();
}

// What runs, and what was submitted here and waits.
function beingMade() {
  if (isFiltered()) return [];
  const running = new Map(known.running.map((task) => [task.id, task]));
  const waiting = known.followed.filter((task) => isUnfinished(task) && !running.has(task.id));
  return [...waiting, ...[...running.values()].reverse()];
}

// The list of tasks

export function newestPath() {
  // What has not ended changes: all that is shown is looked at again.
  const isFinal = known.filter.includes(PICTURES) || known.filter.includes("error_code=");
  const limit = isFinal ? PICTURES_STEP : Math.max(PICTURES_STEP, known.pictures.length);
  return `/tasks?${known.filter}${known.filter && "&"}limit=${Math.min(limit, MOST_LISTED)}`;
}

export function showNewest({ tasks, next }) {
  const onPage = new Set(tasks.map((task) => task.id));
  const at = known.pictures.findLastIndex((task) => onPage.has(task.id));
  if (next && at >= 0) {
    known.pictures = [...tasks, ...known.pictures.slice(at + 1)];
  } else {
    // All there are, or more that are new than fit on a page.
    known.pictures = tasks;
    known.morePictures = next;
  }
  if (known.isSearching) {
    known.isSearching = false;
    say(next ? `${tasks.length} or more found` : `${tasks.length} found`);
  }
}

// Show what was added long ago, and ended: it is far down the list.
export function showEnded(task) {
  if (task?.status !== "completed" || isFiltered()) return;
  if (known.pictures.some(({ id }) => id === task.id)) return;
  // Of those added in the same second it is the newest, as far as can be told.
  const at = known.pictures.findIndex((other) => other.created_at <= task.created_at);
  if (at >= 0) known.pictures.splice(at, 0, task);
  else if (!known.morePictures) known.pictures.push(task);
}

export async function loadMore() {
  if (!known.morePictures) return;
  const address = known.morePictures;
  const page = await api("GET", address);
  if (known.morePictures !== address) return;
  const here = new Set(known.pictures.map((task) => task.id));
  known.pictures.push(...page.tasks.filter((task) => !here.has(task.id)));
  known.morePictures = page.next;
  renderGallery();
}

export const atEnd = new IntersectionObserver(
  async (entries) => {
    // On a busy machine several come at once, the latest last.
    if (!entries.at(-1).isIntersecting) return;
    atEnd.unobserve($("end"));
    await loadMore().catch(() => {});
    atEnd.observe($("end"));
  },
  { rootMargin: "800px" },
);

// Tiles

function createTile(task) {
  const link = make("a", { href: `#${task.id}` });
  link.addEventListener("click", (event) => {
    if (!isSelecting() || pick.hidden) return;
    event.preventDefault();
    pick.click();
  });
  const pick = make("input", { type: "checkbox", className: "pick" });
  pick.setAttribute("aria-label", `Select: ${task.prompt}`);
  pick.addEventListener("change", () => {
    if (pick.checked) known.selected.add(task.id);
    else known.selected.delete(task.id);
    renderTaking();
  });
  return make("li", {}, link, pick);
}

function updateTile(item, task) {
  const [link, pick] = item.children;
  markEdit(item, task);
  const kind = task.image ? "image" : "words";
  if (link.className.split(" ")[0] !== kind) {
    link.className = kind;
    link.replaceChildren(...(task.image ? [imageOf(task, link)] : wordsOf(task)));
  }
  pick.hidden = !task.image;
  pick.checked = known.selected.has(task.id);
  if (!task.image) {
    showState(item, task);
    return;
  }
  item.className = "";
  delete item.dataset.started;
}

function wordsOf(task) {
  const prompt = make("span", { className: "prompt", textContent: task.prompt, dir: "auto" });
  return [prompt, make("span", { className: "state" })];
}

function imageOf(task, link) {
  const image = make("img", { alt: task.prompt, decoding: "async" });
  image.addEventListener("error", () => {
    link.classList.add("gone");
    link.replaceChildren(`Cannot be shown: ${task.prompt.slice(0, 80)}`);
    poke(); // It may be that the server is away.
  });
  image.dataset.thumbnail = `${task.image.url}/thumbnail`;
  nearby.observe(image);
  return image;
}

// Make anew what could not be shown.
export function showAgain() {
  for (const link of $("pictures").querySelectorAll(".gone")) link.className = "";
}
