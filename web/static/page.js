// The page: watch the queue, and draw what it shows.

import { api, waitFor, WAIT_SECONDS } from "./page/api.js";
import { $, say } from "./page/dom.js";
import { atEnd, renderGallery } from "./page/gallery.js";
import { renderQueue, tellAway } from "./page/queue.js";
import { awaited, beCalm, isPoked, known, LATEST_MS, poke, sleep } from "./page/state.js";
import { renderTasks } from "./page/tasks.js";
import { openHash } from "./page/viewer.js";

const IDLE_MS = 4_000; // Between two looks while nothing is under way,
const HIDDEN_MS = 60_000; // and in a tab that nobody sees.
const AGAIN_MS = 3_000; // After a look that failed.
const SOON_MS = 500; // While a task is about to start.
const PENDING_SHOWN = 20;
const PICTURES_STEP = 40;

async function watch() {
  for (;;) {
    beCalm();
    try {
      await look();
      if (known.isAway) comeBack();
      await pauseAfterLook();
    } catch (error) {
      console.debug(error);
      tellAway(error);
      await sleep(AGAIN_MS);
    }
  }
}

async function pauseAfterLook() {
  if (document.hidden) return sleep(HIDDEN_MS);
  const [task] = known.unfinished;
  const isStarting = task?.waiting_for?.startsWith("it is about to start");
  if (isStarting) return sleep(SOON_MS);
  if (task?.status !== "processing") return sleep(IDLE_MS);
  const began = performance.now();
  const seen = isPoked ? null : await waitFor(task);
  // The server answers at once where too many wait; then this page must not ask at once, too.
  const left = WAIT_SECONDS * 1000 - (performance.now() - began);
  if (seen && isUnfinished(seen) && left > 0) await sleep(left);
}

const isUnfinished = (task) => task.status === "pending" || task.status === "processing";

async function look() {
  const before = known.unfinished;
  const queue = await api("GET", "/queue");
  // In the order that a task takes, so that none slips through between two answers.
  const isBusy = queue.pending || queue.processing;
  const pending = isBusy ? await listed("pending", PENDING_SHOWN) : [];
  const running = isBusy ? await listed("processing", 100) : [];
  const started = new Set(running.map((task) => task.id));
  const waiting = pending.filter((task) => !started.has(task.id));
  const place = (task) => task.queue_position ?? Infinity;
  known.queue = queue;
  known.unfinished = [...running.reverse(), ...waiting.sort((a, b) => place(a) - place(b))];
  for (const { id } of known.unfinished) awaited.add(id);
  const { pending: count, calls_today: calls } = queue;
  const mark = JSON.stringify([count, calls, known.unfinished.map((task) => task.id + task.status)]);
  if (mark !== known.lastMark || performance.now() - known.lastEnded > LATEST_MS) {
    known.lastMark = mark;
    await lookAtEnded(before);
  }
  render();
}

async function listed(status, limit) {
  return (await api("GET", `/tasks?status=${status}&limit=${limit}`)).tasks;
}

async function lookAtEnded(before) {
  const page = await api("GET", `/tasks?status=completed&limit=${PICTURES_STEP}`);
  const failed = await listed("failed", known.failedShown + 1);
  const onPage = new Set(page.tasks.map((task) => task.id));
  const at = known.pictures.findLastIndex((task) => onPage.has(task.id));
  if (page.next && at >= 0) {
    known.pictures = [...page.tasks, ...known.pictures.slice(at + 1)];
  } else {
    // All there are, or more that are new than fit on a page.
    known.pictures = page.tasks;
    known.morePictures = page.next;
  }
  known.failed = failed;
  known.lastEnded = performance.now();
  const ended = new Set([...known.pictures, ...failed].map((task) => task.id));
  known.unfinished = known.unfinished.filter((task) => !ended.has(task.id));
  await findVanished(before, ended);
  tellEnded();
}

// A task that was added long ago ends far down the list, beyond what was just looked at.
async function findVanished(before, ended) {
  const here = new Set([...ended, ...known.unfinished.map((task) => task.id)]);
  for (const { id } of before.filter((task) => !here.has(task.id)).slice(0, 10)) {
    const task = await api("GET", `/tasks/${id}`).catch(() => null);
    if (task?.status !== "completed") continue;
    const at = known.pictures.findIndex((other) => other.created_at < task.created_at);
    if (at >= 0) known.pictures.splice(at, 0, task);
    else if (!known.morePictures) known.pictures.push(task);
  }
}

function tellEnded() {
  for (const task of known.pictures) {
    if (awaited.delete(task.id)) say(`Picture ready: ${task.prompt}`);
  }
  for (const task of known.failed) {
    if (awaited.delete(task.id)) say(`Failed: ${task.prompt}. ${task.error}`);
  }
}

function render() {
  renderQueue();
  renderTasks();
  renderGallery();
  const under = known.queue.pending + known.queue.processing;
  document.title = under ? `(${under}) Image proxy` : "Image proxy";
  if (known.isFirstLook) {
    known.isFirstLook = false;
    atEnd.observe($("end"));
    openHash();
  }
}

// What could not be shown meanwhile may be there.
function comeBack() {
  known.isAway = false;
  for (const link of $("pictures").querySelectorAll(".gone")) link.parentNode.remove();
  render();
}

addEventListener("hashchange", openHash);
document.addEventListener("visibilitychange", () => document.hidden || poke());
watch();
