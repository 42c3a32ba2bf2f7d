// The pictures.

import { api } from "./api.js";
import { $, make } from "./dom.js";
import { nearby } from "./images.js";
import { sync } from "./list.js";
import { known } from "./state.js";

export function renderGallery() {
  sync($("pictures"), known.pictures, createPicture, () => {}, $("pictures-title"));
  $("empty").hidden = Boolean(known.pictures.length || known.unfinished.length);
  $("end").textContent = known.morePictures ? "More…" : "";
}

export async function loadMore() {
  if (!known.morePictures) return;
  const address = known.morePictures;
  const page = await api("GET", address);
  if (known.morePictures !== address) return;
  const here = new Set(known.pictures.map((task) => task.id));
  known.pictures.push(...page.tasks.filter((task) => !here.has(task.id)));
  known.morePictures = page.next;
  renderGallery();
}

export const atEnd = new IntersectionObserver(
  async ([{ isIntersecting }]) => {
    if (!isIntersecting) return;
    atEnd.unobserve($("end"));
    await loadMore().catch(() => {});
    atEnd.observe($("end"));
  },
  { rootMargin: "800px" },
);

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
