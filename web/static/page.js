// The page: submit, watch and look, over the same JSON that every client has.

const WAIT_SECONDS = 5; // The long poll on the task that runs longest.
const IDLE_MS = 4_000; // Between two looks while nothing is under way,
const HIDDEN_MS = 60_000; // and in a tab that nobody sees.
const AGAIN_MS = 3_000; // After a look that failed.
const SOON_MS = 500; // While a task is about to start.
const SILENCE_MS = 20_000; // After so long without an answer the server is taken to be away.
const TWICE_MS = 1_000; // The same request again, so soon, is a slip of the finger.
const STEP_MS = 200; // A picture that is passed by sooner is not asked about.
const LATEST_MS = 15_000; // So often the ended tasks are looked at, whatever happens.
const PENDING_SHOWN = 20;
const NOTICES_SHOWN = 2;
const FAILED_STEP = 5;
const PICTURES_STEP = 40;
const DOWNLOADS_AT_ONCE = 4;
const ID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

const $ = (id) => document.getElementById(id);

const known = {
  queue: null,
  unfinished: [],
  failed: [],
  failedShown: FAILED_STEP,
  pictures: [],
  morePictures: null, // The address of the next page, null at the end.
  lastMark: "",
  lastEnded: -LATEST_MS,
  isFirstLook: true,
};

// Talking to the server: one request at a time, and a long poll gives way to any other.

class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let key = remembered();
let clockAhead = 0; // Milliseconds that the server's clock is ahead of this one.
let line = Promise.resolve();
let longPoll = null;

function api(method, path, options = {}) {
  longPoll?.abort();
  const answer = line.then(() => send(method, path, options));
  line = answer.catch(() => {});
  return answer;
}

async function send(method, path, { body, headers = {}, signal } = {}) {
  for (;;) {
    const silence = AbortSignal.timeout(SILENCE_MS);
    const answer = await fetch(path, {
      method,
      body,
      signal: signal ? AbortSignal.any([signal, silence]) : silence,
      cache: "no-store",
      headers: {
        ...headers,
        ...(body && { "Content-Type": "application/json" }),
        ...(key && { "X-API-Key": key }),
      },
    });
    noteClock(answer);
    if (answer.status === 401) {
      await askForKey();
      continue;
    }
    if (answer.status === 204) return null;
    const told = await answer.json().catch(() => null);
    if (answer.ok && told) return told;
    const message = told?.error?.message ?? told?.error;
    throw new Refusal(message ?? `The server answered ${answer.status}`, answer.status);
  }
}

async function waitFor(task) {
  const controller = new AbortController();
  const path = `/status/${task.id}?wait=${WAIT_SECONDS}`;
  const answer = api("GET", path, { signal: controller.signal });
  longPoll = controller;
  try {
    return await answer;
  } catch (error) {
    if (controller.signal.aborted || error.status === 404) return null;
    throw error;
  } finally {
    if (longPoll === controller) longPoll = null;
  }
}

function noteClock(answer) {
  const date = Date.parse(answer.headers.get("Date"));
  if (date) clockAhead = date - Date.now();
}

// The key, kept for this tab.

function remembered() {
  try {
    return sessionStorage.getItem("key") ?? "";
  } catch {
    return "";
  }
}

function askForKey() {
  $("ask-error").textContent = key ? "The server does not know this key." : "";
  $("ask").showModal();
  $("key").select();
  // A browser lets a page keep a dialog open once, not always.
  $("ask").onclose = () => $("ask").showModal();
  return new Promise((resolve) => {
    $("ask-form").onsubmit = (event) => {
      event.preventDefault();
      const given = $("key").value.trim();
      if (!/^[\x21-\x7e]+$/.test(given)) {
        $("ask-error").textContent = "A key is letters, digits and signs, without spaces.";
        return;
      }
      key = given;
      try {
        sessionStorage.setItem("key", key);
      } catch {
        // Then it is asked for again after a reload.
      }
      $("key").value = "";
      $("ask").onclose = null;
      $("ask").close();
      resolve();
    };
  });
}

// Pictures: where a key is wanted they come as blobs, as an <img> sends none.

let downloads = 0;
const downloadsWaiting = [];

async function download(path) {
  if (downloads >= DOWNLOADS_AT_ONCE) await new Promise((go) => downloadsWaiting.push(go));
  downloads += 1;
  try {
    const ask = () => fetch(path, { headers: { "X-API-Key": key } });
    let answer = await ask();
    if (answer.status === 401) {
      await api("GET", "/queue"); // Which asks for the key.
      answer = await ask();
    }
    if (!answer.ok) throw new Refusal(`The server answered ${answer.status}`, answer.status);
    return URL.createObjectURL(await answer.blob());
  } finally {
    downloads -= 1;
    downloadsWaiting.shift()?.();
  }
}

async function show(image, path) {
  image.dataset.path = path;
  if (!key) {
    image.src = path;
    return;
  }
  try {
    const address = await download(path);
    if (image.dataset.path !== path) {
      URL.revokeObjectURL(address);
      return;
    }
    letGo(image);
    image.dataset.path = path;
    image.src = address;
  } catch {
    if (image.dataset.path === path) image.dispatchEvent(new Event("error"));
  }
}

function letGo(image) {
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  image.removeAttribute("src");
  delete image.dataset.path;
}

const nearby = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      nearby.unobserve(target);
      show(target, target.dataset.thumbnail);
    }
  },
  { rootMargin: "600px" },
);

// Watching: look at the queue, then wait for the next task to end, for as long as the page is open.

let poked = false;
let wake = () => {};

function poke() {
  poked = true;
  wake();
}

function sleep(milliseconds) {
  if (poked) return Promise.resolve();
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    wake = () => {
      clearTimeout(timer);
      resolve();
    };
  });
}

async function watch() {
  for (;;) {
    poked = false;
    try {
      await look();
      if (isAway) comeBack();
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
  const seen = poked ? null : await waitFor(task);
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

const awaited = new Set(); // The ids of tasks whose end is told.

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

async function loadMore() {
  if (!known.morePictures) return;
  const address = known.morePictures;
  const page = await api("GET", address);
  if (known.morePictures !== address) return;
  const here = new Set(known.pictures.map((task) => task.id));
  known.pictures.push(...page.tasks.filter((task) => !here.has(task.id)));
  known.morePictures = page.next;
  render();
}

const atEnd = new IntersectionObserver(
  async ([{ isIntersecting }]) => {
    if (!isIntersecting) return;
    atEnd.unobserve($("end"));
    await loadMore().catch(() => {});
    atEnd.observe($("end"));
  },
  { rootMargin: "800px" },
);

// What a person reads and hears.

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function button(label, act, className = "small") {
  const made = make("button", { type: "button", className, textContent: label });
  if (act) made.addEventListener("click", () => act(made));
  return made;
}

// The prompt of a task in a list, and what its buttons are about.
function named(row, prompt, task) {
  prompt.id = `prompt-${task.id}`;
  prompt.dir = "auto";
  for (const one of row.children) one.setAttribute("aria-describedby", prompt.id);
}

// Deleting takes a second press, within a few seconds.
function askTwice(element, act) {
  const label = element.textContent;
  let timer = null;
  element.calm = () => {
    clearTimeout(timer);
    timer = null;
    element.textContent = label;
  };
  element.addEventListener("blur", element.calm);
  element.addEventListener("click", (event) => {
    if (event.detail > 1) return; // The second half of a double click.
    if (timer === null) {
      element.textContent = "Really delete?";
      timer = setTimeout(element.calm, 5000);
      return;
    }
    element.calm();
    act();
  });
  return element;
}

function say(text) {
  $("live").append(make("p", { textContent: text }));
  while ($("live").children.length > 3) $("live").firstChild.remove();
}

// Make the list's items those of the tasks, moving none that stays, so that focus stays too.
function sync(list, tasks, create, update, heading) {
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

function render() {
  renderQueue();
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
  sync($("pictures"), known.pictures, createPicture, () => {}, $("pictures-title"));
  $("empty").hidden = Boolean(known.pictures.length || known.unfinished.length);
  $("end").textContent = known.morePictures ? "More…" : "";
  const under = known.queue.pending + known.queue.processing;
  document.title = under ? `(${under}) Image proxy` : "Image proxy";
  if (known.isFirstLook) {
    known.isFirstLook = false;
    atEnd.observe($("end"));
    openHash();
  }
}

function renderQueue() {
  const { queue } = known;
  const facts = [
    [queue.processing, `of ${queue.concurrency} running`],
    [queue.pending, "waiting"],
    [queue.calls_today, queue.calls_today === 1 ? "call today" : "calls today"],
  ];
  if (queue.quota) facts.push([queue.quota.remaining, `of ${queue.quota.total} left at Chutes`]);
  $("facts").replaceChildren(
    ...facts.map(([count, what]) =>
      make("li", {}, make("b", { textContent: count.toLocaleString() }), ` ${what}`),
    ),
  );
  $("pause").textContent = queue.paused ? "Resume" : "Pause";
  $("pause").hidden = false;
  const notices = queue.held
    .slice(0, NOTICES_SHOWN)
    .map(({ reason, until }) => `Held: ${reason}; next try at ${when(until)}`);
  const more = queue.held.length - notices.length;
  if (more > 0) notices.push(`${more} more held`);
  if (queue.paused) notices.unshift(`Paused${queue.pause_reason ? `: ${queue.pause_reason}` : ""}`);
  renderNotices(notices, queue.pause_reason ? "bad" : "");
}

function renderNotices(notices, className = "") {
  const before = [...$("notices").children].map((item) => item.textContent);
  if (JSON.stringify(before) === JSON.stringify(notices)) return;
  $("notices").replaceChildren(
    ...notices.map((text, n) => make("li", { textContent: text, className: n ? "" : className })),
  );
  for (const text of notices.filter((text) => !before.includes(text))) say(text);
}

let isAway = false;

function tellAway(error) {
  isAway = true;
  const what = error.status ? error.message : "The server does not answer";
  renderNotices([`${what}; trying again…`], "bad");
}

// What could not be shown meanwhile may be there.
function comeBack() {
  isAway = false;
  for (const link of $("pictures").querySelectorAll(".gone")) link.parentNode.remove();
  render();
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

function createPicture(task) {
  const image = make("img", { alt: task.prompt, decoding: "async" });
  const link = make("a", { href: `#${task.id}` }, image);
  image.addEventListener("error", () => {
    link.classList.add("gone");
    link.replaceChildren(`Cannot be shown: ${task.prompt.slice(0, 80)}`);
  });
  image.dataset.thumbnail = `${task.image.url}/thumbnail`;
  nearby.observe(image);
  return make("li", {}, link);
}

const moment = (text) => Date.parse(`${text.replace(" ", "T")}Z`);

function when(text) {
  const then = new Date(moment(text));
  const isToday = then.toDateString() === new Date().toDateString();
  return isToday ? then.toLocaleTimeString() : then.toLocaleString();
}

function lasting(seconds) {
  const whole = Math.round(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

// What a person does.

async function act(fault, method, path) {
  fault.textContent = "";
  try {
    const told = await api(method, path);
    known.lastMark = "";
    poke();
    return told ?? true;
  } catch (error) {
    poke();
    if (method === "DELETE" && error.status === 404) return true; // Someone else was quicker.
    fault.textContent = error.status ? error.message : "The server does not answer; try again.";
    return null;
  }
}

let lost = null; // A request whose answer was lost: it is sent again under the same key.
let isSending = false;
let sent = { body: "", at: -TWICE_MS };

async function submit(event) {
  event.preventDefault();
  const body = JSON.stringify(formFields());
  const isSlip = body === sent.body && performance.now() - sent.at < TWICE_MS;
  if (isSending || isSlip) return;
  lost = lost?.body === body ? lost : { body, key: randomKey() };
  isSending = true;
  showFault("");
  try {
    const headers = { "Idempotency-Key": lost.key };
    awaited.add((await api("POST", "/generate", { body, headers })).id);
    lost = null;
    sent = { body, at: performance.now() };
    known.lastMark = "";
    $("make-note").textContent = "It is in the queue.";
    say("The picture is in the queue");
  } catch (error) {
    // Refused for good; after anything else the task may be there.
    if (error.status >= 400 && error.status < 500) lost = null;
    showFault(
      error.status
        ? error.message
        : "The server does not answer. Press again: the picture is not made twice.",
    );
  } finally {
    isSending = false;
    poke();
  }
}

function randomKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))]
    .map((byte) => byte.toString(16).padStart(2, "0"))
    .join("");
}

const NUMBERS = ["seed", "num_inference_steps", "guidance_scale", "true_cfg_scale", "priority"];

// A number as it was typed, where it is none: the server's refusal names the field and the rule.
function number(text) {
  return /^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?$/i.test(text) ? Number(text) : text;
}

function formFields() {
  const fields = { prompt: $("prompt").value };
  const sides = $("size").value.split("x");
  const [width, height] = sides.length === 2 ? sides : [$("width").value, $("height").value];
  const typed = { width, height };
  for (const name of NUMBERS) typed[name] = $(name).value;
  for (const [name, text] of Object.entries(typed)) {
    if (text.trim()) fields[name] = number(text.trim());
  }
  if ($("model").value.trim()) fields.model = $("model").value.trim();
  if ($("negative_prompt").value.trim()) fields.negative_prompt = $("negative_prompt").value;
  return fields;
}

// Show what is wrong, at the field that the server's sentence begins with.
function showFault(sentence) {
  $("make-error").textContent = sentence;
  $("make-note").textContent = "";
  for (const field of $("make").querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
  const name = sentence.split(" ")[0].toLowerCase();
  const field = $("make").elements.namedItem(name);
  if (!name || !field) return;
  if ($("more").contains(field)) $("more").open = true;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", "make-error");
  field.focus();
}

function useAgain(task) {
  $("prompt").value = task.prompt;
  $("model").value = task.model;
  $("negative_prompt").value = task.params.negative_prompt ?? "";
  const used = { ...task.params, priority: task.priority || "" };
  for (const name of NUMBERS) $(name).value = used[name] ?? "";
  $("width").value = task.params.width;
  $("height").value = task.params.height;
  $("size").value = `${task.params.width}x${task.params.height}`;
  if ($("size").selectedIndex < 0) $("size").value = "";
  chooseSize();
  showFault("");
  $("more").open ||= [...$("more").querySelectorAll("input, textarea")].some((one) => one.value);
  $("make").scrollIntoView({ block: "center" });
  $("prompt").focus();
}

function chooseSize() {
  $("sides").hidden = $("size").value !== "";
}

// One task, large.

let opened = null;

function openHash() {
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
  render();
  say("Deleted");
}

// The beginning.

$("make").addEventListener("submit", submit);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
});
$("size").addEventListener("change", chooseSize);
$("pause").addEventListener("click", () => {
  act($("queue-error"), "POST", known.queue.paused ? "/queue/resume" : "/queue/pause");
});
$("retry-all").addEventListener("click", () => act($("failed-error"), "POST", "/tasks/retry"));
$("failed-more").addEventListener("click", () => {
  known.failedShown = Math.min(known.failedShown + FAILED_STEP, 199);
  known.lastMark = "";
  poke();
});
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
$("ask").addEventListener("cancel", (event) => event.preventDefault());
addEventListener("hashchange", openHash);
document.addEventListener("visibilitychange", () => document.hidden || poke());
setInterval(() => {
  if (!document.hidden) document.querySelectorAll("[data-started]").forEach(tick);
}, 1000);

watch();
api("GET", "/v1/models")
  .then(({ data }) => {
    $("models").replaceChildren(...data.map(({ id }) => make("option", { value: id })));
    $("model").placeholder = data[0].id;
  })
  .catch(() => {});
