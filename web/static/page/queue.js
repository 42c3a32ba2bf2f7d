// The queue, at the top of the page.

import { sentenceOf } from "./api.js";
import { $, make, say } from "./dom.js";
import { act, known } from "./state.js";
import { inLocalTime, when } from "./words.js";

const NOTICES_SHOWN = 2;

export function renderQueue() {
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
    .map(({ reason, until }) => `On hold: ${inLocalTime(reason)}; next try at ${when(until)}`);
  const more = queue.held.length - notices.length;
  if (more > 0) notices.push(`${more} more on hold`);
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

export function tellAway(error) {
  known.isAway = true;
  renderNotices([`${sentenceOf(error)}; trying again…`], "bad");
}

$("pause").addEventListener("click", () => {
  act($("queue-error"), "POST", known.queue.paused ? "/queue/resume" : "/queue/pause");
});
