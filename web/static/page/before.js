// What a task edits: large, beside what came of it, and small in the lists.

import { $, make } from "./dom.js";
import { letGo, nearby, show } from "./images.js";

// Show the pictures that a task edits beside its own; none for any other.
export function renderBefore({ inputs = [], image }) {
  const list = $("before");
  $("after").hidden = !inputs.length || !image;
  const paths = inputs.map(({ url }) => url).join(" ");
  if ((list.dataset.paths ?? "") === paths) return;
  list.dataset.paths = paths;
  for (const shown of list.querySelectorAll("img")) letGo(shown);
  list.replaceChildren(...inputs.map(createItem));
}

function createItem({ url, width, height }, n, { length }) {
  const number = length > 1 ? ` ${n + 1} of ${length}` : "";
  const image = make("img", { alt: `Picture${number} that is edited`, width, height });
  const caption = make("span", { className: "caption", textContent: `Before${number}` });
  const item = make("li", {}, image, caption);
  image.addEventListener("error", () => {
    letGo(image);
    image.replaceWith(make("p", { className: "state", textContent: "It cannot be shown." }));
    delete $("before").dataset.paths; // So that it is tried again.
  });
  show(image, url);
  return item;
}

// Show in a list what a task edits.
export function showInput(item, { inputs = [] }) {
  if (!inputs.length || item.querySelector(".input")) return;
  const more = inputs.length > 1 ? ` and ${inputs.length - 1} more` : "";
  const alt = `Edits this picture${more}`;
  const image = make("img", { className: "input", alt, width: 48, height: 48 });
  image.dataset.thumbnail = inputs[0].url;
  nearby.observe(image);
  item.append(image);
}

// Mark a tile of the gallery whose picture is an edit.
export function markEdit(item, { inputs = [] }) {
  if (!inputs.length || item.querySelector(".caption")) return;
  item.append(make("span", { className: "caption", textContent: "Edited" }));
}
