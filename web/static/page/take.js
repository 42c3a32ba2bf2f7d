// Take pictures along: those that are selected, or all that are shown, as one zip.

import { key, sentenceOf } from "./api.js";
import { $, make } from "./dom.js";
import { download } from "./images.js";
import { known } from "./state.js";

const MOST_TAKEN = 100; // In one zip.
const BLOB_MS = 60_000; // Until the browser has surely begun to save it.

export const isSelecting = () => $("select").getAttribute("aria-pressed") === "true";

export function renderTaking() {
  const there = known.pictures.filter((task) => task.image);
  const taken = taking().length;
  $("pictures").classList.toggle("selecting", isSelecting());
  $("select").hidden = $("take").hidden = !there.length;
  $("take").disabled = !taken;
  const first = !isSelecting() && there.length > taken ? "the first " : "";
  $("take").textContent = `Download ${first}${taken} ${isSelecting() ? "selected" : "shown"}`;
}

function taking() {
  return known.pictures
    .filter((task) => task.image && (!isSelecting() || known.selected.has(task.id)))
    .slice(0, MOST_TAKEN);
}

export function stopSelecting() {
  known.selected.clear();
  for (const pick of $("pictures").querySelectorAll(".pick")) pick.checked = false;
  $("select").setAttribute("aria-pressed", "false");
}

// With a key the zip comes as a blob: a link sends none.
async function take() {
  const ids = taking().map((task) => `id=${task.id}`);
  const path = `/images.zip?${ids.join("&")}`;
  $("take-error").textContent = "";
  try {
    const address = key ? await download(path) : path;
    make("a", { href: address, download: "images.zip" }).click();
    if (key) setTimeout(() => URL.revokeObjectURL(address), BLOB_MS);
  } catch (error) {
    $("take-error").textContent = `${sentenceOf(error)}; try again.`;
  }
}

$("select").addEventListener("click", () => {
  const wasSelecting = isSelecting();
  stopSelecting();
  $("select").setAttribute("aria-pressed", `${!wasSelecting}`);
  renderTaking();
});
$("take").addEventListener("click", take);
