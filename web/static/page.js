// The page: watch the queue, and draw what it shows.

import { api, waitFor, WAIT_SECONDS } from "./page/api.js";
import { $, say } from "./page/dom.js";
import * as find from "./page/find.js";
import { renderFollowed } from "./page/followed.js";
import * as form from "./page/form.js";
import {
  atEnd, newestPath, renderGallery, showAgain, showEnded, showNewest,
} from "./page/gallery.js";
import { renderQueue, tellAway } from "./page/queue.js";
import {
  awaited, beCalm, isFailure, isPoked, isUnfinished, known, LATEST_MS, poke, sleep,
} from "./page/state.js";
import { listFailed, renderTasks } from "./page/tasks.js";
import { openHash, renderOpened, reopen } from "./page/viewer.js";
import { inLocalTime } from "./page/words.js";

const IDLE_MS = 4_000; // Between two looks while nothing is under way,
const HIDDEN_MS = 60_000; // and in a tab that nobody sees.
const AGAIN_MS = 3_000; // After a look that failed.
const SOON_MS = 500; // While a task is about to start, or others may have ended.
const MOST_SOUGHT = 10; // Tasks at one look that are in no list.

async function watch() {
  for (;;) {
    beCalm();
    try {
      await look();
      if (known.isAway) comeBack();
      await pauseAfterLook();
    } catch (error) {
      console.debug(error);
      known.isDue = true;
      tellAway(error);
      renderFollowed();
      await sleep(AGAIN_MS);
    }
  }
}

async function pauseAfterLook() {
  if (document.hidden) return sleep(HIDDEN_MS);
  const [task] = known.running;
  if (known.isDue) return sleep(SOON_MS);
  if (known.pending[0]?.waiting_for?.startsWith("it is about to start")) return sleep(SOON_MS);
  if (!task) return sleep(IDLE_MS);
  const began = performance.now();
  const seen = isPoked ? null : await waitFor(task);
  // The server answers at once where too many wait; then this page must not ask at once, too.
  const left = WAIT_SECONDS * 1000 - (performance.now() - began);
  if (seen && isUnfinished(seen) && left > 0) await sleep(left);
}

async function look() {
  const { filter, pendingShown } = known;
  // What has ended stays so: it is still true when all others are asked for, at one instant.
  const isDue = known.isDue || performance.now() - known.lastEnded > LATEST_MS;
  known.isDue = false;
  const newest = isDue ? await api("GET", newestPath()) : null;
  const failed = isDue ? await listFailed(known.failedShown + 1) : known.failed;
  const { running, next, ...queue } = await api("GET", `/queue?tasks=${pendingShown}`);
  const shown = [...(newest?.tasks ?? known.pictures), ...failed];
  const ended = shown.filter((task) => !isUnfinished(task));
  const found = byId([...ended, ...next, ...running]);
  await findOthers(found);
  const ids = [...next, ...running].map((task) => task.id + task.status);
  const mark = JSON.stringify([queue.pending, queue.calls_today, ids]);
  if (mark !== known.lastMark) known.isDue = true; // Others may have ended meanwhile.
  known.lastMark = mark;
  Object.assign(known, { queue, failed, running: running.reverse(), pending: next });
  for (const { id } of [...running, ...next]) awaited.add(id);
  known.followed = known.followed.map((task) => found.get(task.id) ?? task);
  known.followed = known.followed.filter((task) => found.get(task.id) !== null);
  if (newest && filter !== known.filter) {
    known.isDue = true;
  } else if (newest) {
    known.lastEnded = performance.now();
    showNewest({ ...newest, tasks: newest.tasks.map((task) => found.get(task.id) ?? task) });
  }
  for (const task of found.values()) showEnded(task);
  tellEnded(found);
  render();
  renderOpened(found);
}

const byId = (tasks) => new Map(tasks.map((task) => [task.id, task]));

// Look for those that were to be seen and are in no list: they are far down one, or deleted.
async function findOthers(found) {
  const expected = [...known.followed, ...(known.opened?.status ? [known.opened] : [])];
  const sought = [...expected.filter(isUnfinished), ...known.running, ...known.pending];
  const ids = new Set(sought.map((task) => task.id).filter((id) => !found.has(id)));
  for (const id of [...ids].slice(0, MOST_SOUGHT)) {
    found.set(id, await getTask(id));
  }
}

async function getTask(id) {
  try {
    return await api("GET", `/status/${id}`);
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

function tellEnded(found) {
  for (const [id, task] of found) {
    if ((task && isUnfinished(task)) || !awaited.delete(id) || !task) continue;
    if (task.status === "completed") say(`Picture ready: ${task.prompt}`);
    if (isFailure(task)) say(`Failed: ${task.prompt}. ${inLocalTime(task.error)}`);
  }
}

function render() {
  renderQueue();
  renderTasks();
  renderFollowed();
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
  showAgain();
  reopen();
  render();
  loadModels();
}

let listed = "";

async function loadModels() {
  try {
    const { models } = await api("GET", "/models");
    if (JSON.stringify(models) === listed) return;
    listed = JSON.stringify(models);
    form.offerModels(models);
    find.offerModels(models.map(({ name }) => name));
  } catch (error) {
    console.debug(error); // They are loaded when the server is back.
  }
}

// They may be others since: whoever is about to choose one sees those of now.
for (const id of ["model", "find-model"]) $(id).addEventListener("focus", loadModels);
addEventListener("hashchange", openHash);
document.addEventListener("visibilitychange", () => document.hidden || poke());
watch();
loadModels();
