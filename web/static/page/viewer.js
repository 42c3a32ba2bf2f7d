// One task, large.

import { api, sentenceOf } from "./api.js";
import { renderBefore } from "./before.js";
import { $, askTwice, make, say } from "./dom.js";
import { edit, useAgain } from "./form.js";
import { loadMore, renderGallery } from "./gallery.js";
import { letGo, show, whyNot } from "./images.js";
import { act, deleteTask, isUnfinished, known, poke } from "./state.js";
import { renderTasks, showState } from "./tasks.js";
import { labelOf, outcomeOf, when } from "./words.js";

const STEP_MS = 200; // A picture that is passed by sooner is not asked about.
const ID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

export function openHash() {
  const id = location.hash.slice(1);
  if (ID.test(id)) open(id);
  else if ($("large").open) $("large").close();
}

export function reopen() {
  if (known.opened) open(known.opened.id);
}

async function open(id) {
  const { running, pending, followed, pictures, failed } = known;
  const all = [...running, ...pending, ...pictures, ...failed, ...followed];
  known.opened = all.find((task) => task.id === id && task.params) ?? { id, prompt: "…" };
  $("delete").calm();
  $("again").disabled = false;
  $("large-note").textContent = "";
  renderLarge(known.opened, []);
  if (!$("large").open) $("large").showModal();
  await new Promise((go) => setTimeout(go, STEP_MS));
  if (known.opened?.id === id) await load(id);
  poke();
}

async function load(id) {
  try {
    const task = await api("GET", `/tasks/${id}`);
    if (known.opened?.id === id) renderLarge(task, task.calls);
  } catch (error) {
    if (known.opened?.id === id) $("large-error").textContent = sentenceOf(error);
  }
}

// Show what has become of a task that had not ended.
export function renderOpened(found) {
  const { opened } = known;
  if (!opened?.status || !isUnfinished(opened) || !found.has(opened.id)) return;
  const task = found.get(opened.id);
  if (!task) $("large").close(); // It was deleted.
  else if (task.status !== opened.status) load(task.id);
  else showState($("frame"), task);
}

function renderLarge(task, calls) {
  known.opened = task;
  $("large-error").textContent = "";
  $("large-prompt").textContent = task.prompt;
  renderFrame(task);
  renderBefore(task);
  $("edit").hidden = !task.image;
  const at = known.pictures.findIndex((one) => one.id === task.id);
  $("previous").disabled = at < 1;
  $("next").disabled = at < 0 || at + 1 >= known.pictures.length;
  const isUnderWay = isUnfinished(task);
  $("cancel").hidden = !isUnderWay;
  $("again").hidden = isUnderWay;
  for (const id of ["use", "delete"]) $(id).disabled = !task.status;
  $("delete").disabled ||= task.status === "processing";
  if (document.activeElement?.disabled || document.activeElement?.hidden) $("large-prompt").focus();
  $("settings").replaceChildren(
    ...Object.entries(settingsOf(task)).flatMap(([name, value]) => [
      make("dt", { textContent: name }),
      make("dd", { textContent: value }),
    ]),
  );
  $("calls").replaceChildren(...calls.map((call) => make("li", { textContent: toldOf(call) })));
  $("calls-title").hidden = !calls.length;
}

function renderFrame(task) {
  const image = $("large-image");
  const path = task.image?.url ?? "";
  if (path && image.dataset.path === path) return;
  $("download").hidden = image.hidden = !path;
  $("download").removeAttribute("href");
  letGo(image);
  if (!path && task.status) showState($("frame"), task);
  else showNote("");
  if (!path) return;
  image.alt = task.prompt;
  image.width = task.image.width;
  image.height = task.image.height;
  show(image, path);
  $("download").download = task.file_path.split("/").at(-1);
}

function showNote(text) {
  delete $("frame").dataset.started;
  $("frame").classList.remove("running", "bad");
  $("large-state").textContent = text;
}

async function showFault() {
  const image = $("large-image");
  const { path } = image.dataset;
  if (!path) return;
  letGo(image);
  image.hidden = $("download").hidden = true;
  const why = await whyNot(path);
  if (known.opened?.image?.url === path && !image.dataset.path) showNote(why);
  poke();
}

function settingsOf(task) {
  if (!task.params) return {};
  const { width, height, ...others } = task.params;
  const named = {
    Model: task.model,
    Size: width && height && `${width} × ${height}`,
    ...Object.fromEntries(Object.entries(others).map(([name, value]) => [labelOf(name), value])),
    Priority: task.priority || null,
    Added: when(task.created_at),
    Ended: task.finished_at && when(task.finished_at),
    File: task.image && `${task.image.content_type}, ${Math.ceil(task.image.bytes / 1000)} kB`,
    Id: task.id,
  };
  return Object.fromEntries(Object.entries(named).filter(([, value]) => value != null));
}

function toldOf(call) {
  const told = [`${when(call.started)}: ${outcomeOf(call)}`];
  if (call.http_status) told.push(`HTTP ${call.http_status}`);
  if (call.seconds != null) told.push(`${call.seconds.toFixed(1)} s`);
  return told.join(", ");
}

function step(by) {
  const at = known.pictures.findIndex((task) => task.id === known.opened?.id);
  const task = at < 0 ? null : known.pictures[at + by];
  if (!task) return;
  if (at + by + 5 > known.pictures.length) loadMore().catch(() => {});
  history.replaceState(null, "", `#${task.id}`);
  open(task.id);
}

function closed() {
  $("pictures").querySelector(`[href="#${known.opened?.id}"]`)?.focus();
  known.opened = null;
  letGo($("large-image"));
  renderBefore({});
  if (location.hash) history.replaceState(null, "", location.pathname);
}

async function deleteOpened() {
  const { id } = known.opened;
  if (!(await deleteTask($("large-error"), id))) return;
  if (known.opened?.id === id) $("large").close();
  renderGallery();
  renderTasks();
  say("Deleted");
}

// The dialog.

$("large").addEventListener("close", closed);
addEventListener("keydown", (event) => {
  if (!$("large").open || $("ask").open) return;
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
$("large-image").addEventListener("error", showFault);
$("large-image").addEventListener("load", () => {
  $("download").href = $("large-image").src;
});
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("close").addEventListener("click", () => $("large").close());
for (const [id, act] of [["use", useAgain], ["edit", edit]]) {
  $(id).addEventListener("click", () => {
    const task = known.opened;
    known.opened = null; // So that focus does not go back to the picture.
    $("large").close();
    act(task);
  });
}
$("again").addEventListener("click", async () => {
  const { id } = known.opened;
  $("again").disabled = true;
  const done = await act($("large-error"), "POST", `/tasks/${id}/retry`);
  if (known.opened?.id !== id) return;
  $("again").disabled = Boolean(done);
  $("large-note").textContent = done ? "It is made again." : "";
});
$("cancel").addEventListener("click", () => {
  act($("large-error"), "POST", `/tasks/${known.opened.id}/cancel`);
});
askTwice($("delete"), deleteOpened);
