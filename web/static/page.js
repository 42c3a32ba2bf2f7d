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
const SOON_MS = 500; // While a task is about to start.
const LOOKS = 5; // So often at most, until all answers are of one instant.
const MOST_RUNNING = 100; // More than CONCURRENCY may be.
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
      tellAway(error);
      renderFollowed();
      await sleep(AGAIN_MS);
    }
  }
}

async function pauseAfterLook() {
  if (document.hidden) return sleep(HIDDEN_MS);
  const [task] = known.running;
  if (known.pending[0]?.waiting_for?.startsWith("it is about to start")) return sleep(SOON_MS);
  if (!task) return sleep(IDLE_MS);
  const began = performance.now();
  const seen = isPoked ? null : await waitFor(task);
  // The server answers at once where too many wait; then this page must not ask at once, too.
  const left = WAIT_SECONDS * 1000 - (performance.now() - began);
  if (seen && isUnfinished(seen) && left > 0) await sleep(left);
}

async function look() {
  let seen;
  for (let n = 0; n < LOOKS && !seen?.isOfOneInstant; n += 1) seen = await lookOnce();
  await findOthers(seen.found);
  const { queue, pending, running, failed, found } = seen;
  const isLast = (task) => found.get(task.id) === task;
  Object.assign(known, { queue, failed });
  known.pending = pending.filter(isLast);
  known.running = running.filter(isLast);
  for (const { id } of [...known.running, ...known.pending]) awaited.add(id);
  known.followed = known.followed.map((task) => found.get(task.id) ?? task);
  known.followed = known.followed.filter((task) => found.get(task.id) !== null);
  if (seen.newest && seen.filter === known.filter) {
    known.lastMark = seen.mark;
    known.lastEnded = performance.now();
    showNewest(seen.newest);
  }
  for (const task of found.values()) showEnded(task);
  tellEnded(found);
  render();
  renderOpened(found);
}

async function lookOnce() {
  const { filter, pendingShown } = known;
  const queue = await api("GET", "/queue");
  const next = `/tasks?status=pending&order=queue&limit=${pendingShown}`;
  // Only where there are any: what came since is of another instant.
  const pending = queue.pending ? (await api("GET", next)).tasks : [];
  const started = `/tasks?status=processing&limit=${MOST_RUNNING}`;
  const running = queue.processing ? (await api("GET", started)).tasks.reverse() : [];
  const ids = [...pending, ...running].map((task) => task.id + task.status);
  const mark = JSON.stringify([queue.pending, queue.calls_today, ids]);
  const isDue = mark !== known.lastMark || performance.now() - known.lastEnded > LATEST_MS;
  const newest = isDue ? await api("GET", newestPath()) : null;
  const failed = isDue ? await listFailed(known.failedShown + 1) : known.failed;
  const shown = [...(newest?.tasks ?? known.pictures), ...failed];
  const ended = byId(shown.filter((task) => !isUnfinished(task)));
  const found = new Map([...byId(pending), ...byId(running), ...ended]);
  const isOfOneInstant =
    pending.length === Math.min(queue.pending, pendingShown) &&
    running.length === queue.processing &&
    found.size === pending.length + running.length + ended.size;
  return { queue, pending, running, newest, failed, found, filter, mark, isOfOneInstant };
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

async function loadModels() {
  try {
    const { models } = await api("GET", "/models");
    form.offerModels(models);
    find.offerModels(models.map(({ name }) => name));
  } catch (error) {
    console.debug(error); // They are loaded when the server is back.
  }
}

addEventListener("hashchange", openHash);
document.addEventListener("visibilitychange", () => document.hidden || poke());
watch();
loadModels();
