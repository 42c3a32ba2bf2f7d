// Find tasks: by the words of their prompts, by how they stand, and by model.

import { $ } from "./dom.js";
import { renderGallery } from "./gallery.js";
import { known, PICTURES, refresh } from "./state.js";
import { stopSelecting } from "./take.js";
import { setOptions } from "./tasks.js";
import { FAILURES } from "./words.js";

const TYPING_MS = 300;
const EVERYTHING = "everything";
const SHOWN = [
  [PICTURES, "Pictures"],
  ["status=pending&order=queue", "Waiting"],
  ["status=processing", "Running"],
  ["status=failed", "Failed or canceled"],
  ["error_code=canceled", "Canceled"],
  ...Object.entries(FAILURES).map(([code, words]) => [`error_code=${code}`, `Failed: ${words}`]),
  [EVERYTHING, "Everything"],
];

function search() {
  const shown = $("find-shown").value;
  const query = new URLSearchParams(shown === EVERYTHING ? "" : shown);
  const words = $("find-words").value.trim();
  if (words) query.set("q", words);
  if ($("find-model").value) query.set("model", $("find-model").value);
  if (`${query}` === known.filter) return;
  Object.assign(known, { filter: `${query}`, isSearching: true, pictures: [], morePictures: null });
  stopSelecting();
  renderGallery();
  refresh();
}

export function offerModels(names) {
  setOptions($("find-model"), [["", "All models"], ...names.map((name) => [name, name])]);
}

setOptions($("find-shown"), SHOWN);
offerModels([]);
for (const id of ["find-shown", "find-model"]) $(id).addEventListener("change", search);
$("find").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
let typing = 0;
$("find-words").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(search, TYPING_MS);
});
