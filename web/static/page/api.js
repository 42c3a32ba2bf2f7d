// Talking to the server: one request at a time, and a long poll gives way to any other.

import { $ } from "./dom.js";

export const WAIT_SECONDS = 5; // The long poll on the task that runs longest.
const SILENCE_MS = 20_000; // After so long without an answer the server is taken to be away,
const UPLOAD_MS = 300_000; // or, where files are on their way to it over a slow line, after so long.

export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const sentenceOf = (error) =>
  error.status ? error.message : "The server does not answer";

export let key = remembered();
export let clockAhead = 0; // Milliseconds that the server's clock is ahead of this one.
let line = Promise.resolve();
let longPoll = null;

export function api(method, path, options = {}) {
  endLongPoll();
  const answer = line.then(() => send(method, path, options));
  line = answer.catch(() => {});
  return answer;
}

async function send(method, path, { body, headers = {}, signal } = {}) {
  for (;;) {
    const isUpload = body instanceof FormData; // Whose type the browser names.
    const silence = AbortSignal.timeout(isUpload ? UPLOAD_MS : SILENCE_MS);
    const answer = await fetch(path, {
      method,
      body,
      signal: signal ? AbortSignal.any([signal, silence]) : silence,
      cache: "no-store",
      headers: {
        ...headers,
        ...(body && !isUpload && { "Content-Type": "application/json" }),
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

export function endLongPoll() {
  longPoll?.abort();
}

export async function waitFor(task) {
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

$("ask").addEventListener("cancel", (event) => event.preventDefault());
