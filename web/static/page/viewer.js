// One task, large.

import { api } from "./api.js";
import { $, askTwice, make, say } from "./dom.js";
import { useAgain } from "./form.js";
import { loadMore, renderGallery } from "./gallery.js";
import { letGo, show } from "./images.js";
import { act, known, poke } from "./state.js";
import { renderTasks } from "./tasks.js";
import { when } from "./words.js";

const STEP_MS = 200; // A picture that is passed by sooner is not asked about.
const ID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

let opened = null;

export function openHash() {
  const id = location.hash.slice(1);
  if (ID.test(id)) open(id);
  else if ($("large").open) $("large").close();
}

async function open(id) {
  const task = [...known.pictures, ...known.failed].find((one) => one.id === id);
  opened = { id, task: null };
  $("delete").calm();
  $("again").disabled = false;
  $("large-note").textContent = "";
  renderLarge(task ?? { id, prompt: "…" }, []);
  if (!$("large").open) $("large").showModal();
  await new Promise((go) => setTimeout(go, STEP_MS));
  if (opened?.id !== id) return;
  try {
    const whole = await api("GET", `/tasks/${id}`);
    if (opened?.id === id) renderLarge(whole, whole.calls);
  } catch (error) {
    if (opened?.id === id) $("large-error").textContent = error.message;
  }
  poke();
}

function renderLarge(task, calls) {
  opened.task = task;
  $("large-error").textContent = "";
  $("large-prompt").textContent = task.prompt;
  renderFrame(task);
  const at = known.pictures.findIndex((one) => one.id === task.id);
  $("previous").disabled = at < 1;
  $("next").disabled = at < 0 || at + 1 >= known.pictures.length;
  if (document.activeElement?.disabled) $("large-prompt").focus();
  for (const id of ["use", "delete"]) $(id).disabled = !task.status;
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
  $("large-fault").textContent = path ? "" : (task.error ?? task.waiting_for ?? task.status ?? "");
  letGo(image);
  if (!path) return;
  image.alt = task.prompt;
  image.width = task.image.width;
  image.height = task.image.height;
  show(image, path);
  $("download").download = task.file_path.split("/").at(-1);
}

function settingsOf(task) {
  if (!task.status) return {};
  const named = {
    Model: task.model,
    Size: `${task.params.width} × ${task.params.height}`,
    "Negative prompt": task.params.negative_prompt,
    Seed: task.params.seed,
    Steps: task.params.num_inference_steps,
    "Guidance scale": task.params.guidance_scale,
    "True CFG scale": task.params.true_cfg_scale,
    Priority: task.priority || undefined,
    Added: when(task.created_at),
    Ended: task.finished_at && when(task.finished_at),
    File: task.image && `${task.image.content_type}, ${Math.ceil(task.image.bytes / 1000)} kB`,
    Id: task.id,
  };
  return Object.fromEntries(Object.entries(named).filter(([, value]) => value != null));
}

function toldOf(call) {
  const told = [`${when(call.started)}: ${call.outcome ?? "under way"}`];
  if (call.http_status) told.push(`HTTP ${call.http_status}`);
  if (call.seconds != null) told.push(`${call.seconds.toFixed(1)} s`);
  return told.join(", ");
}

function step(by) {
  const at = known.pictures.findIndex((task) => task.id === opened?.id);
  const task = at < 0 ? null : known.pictures[at + by];
  if (!task) return;
  if (at + by + 5 > known.pictures.length) loadMore().catch(() => {});
  history.replaceState(null, "", `#${task.id}`);
  open(task.id);
}

function closed() {
  $("pictures").querySelector(`[href="#${opened?.id}"]`)?.focus();
  opened = null;
  letGo($("large-image"));
  if (location.hash) history.replaceState(null, "", location.pathname);
}

async function deleteOpened() {
  const { id } = opened;
  if (!(await act($("large-error"), "DELETE", `/tasks/${id}`))) return;
  known.pictures = known.pictures.filter((task) => task.id !== id);
  known.failed = known.failed.filter((task) => task.id !== id);
  if (opened?.id === id) $("large").close();
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
$("large-image").addEventListener("error", () => {
  if (!$("large-image").dataset.path) return;
  $("large-image").hidden = $("download").hidden = true;
  $("large-fault").textContent = "The picture cannot be shown; its file may be gone.";
});
$("large-image").addEventListener("load", () => {
  $("download").href = $("large-image").src;
});
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("close").addEventListener("click", () => $("large").close());
$("use").addEventListener("click", () => {
  const { task } = opened;
  opened = null; // So that focus does not go back to the picture.
  $("large").close();
  useAgain(task);
});
$("again").addEventListener("click", async () => {
  const { id } = opened;
  $("again").disabled = true;
  const done = await act($("large-error"), "POST", `/tasks/${id}/retry`);
  if (opened?.id !== id) return;
  $("again").disabled = Boolean(done);
  $("large-note").textContent = done ? "It is made again." : "";
});
askTwice($("delete"), deleteOpened);
