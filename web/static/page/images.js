// Pictures: where a key is wanted they come as blobs, as an <img> sends none.

import { api, key, Refusal, sentenceOf } from "./api.js";

const DOWNLOADS_AT_ONCE = 4;

let downloads = 0;
const downloadsWaiting = [];

export async function fetchBlob(path) {
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
    return await answer.blob();
  } finally {
    downloads -= 1;
    downloadsWaiting.shift()?.();
  }
}

export const download = async (path) => URL.createObjectURL(await fetchBlob(path));

export async function show(image, path) {
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

// Return why a picture could not be shown: where nobody answers, it is not gone.
export async function whyNot(path) {
  try {
    const headers = key ? { "X-API-Key": key } : {};
    const { ok, status } = await fetch(path, { method: "HEAD", headers, cache: "no-store" });
    if (status === 404) return "The picture was deleted.";
    if (status === 410) return "The picture was made, but its file is gone.";
    return ok ? "The file is there, but shows no picture." : `The server answered ${status}.`;
  } catch (error) {
    return `${sentenceOf(error)}. The picture is shown as soon as it does.`;
  }
}

export function letGo(image) {
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  image.removeAttribute("src");
  delete image.dataset.path;
}

export const nearby = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      nearby.unobserve(target);
      show(target, target.dataset.thumbnail);
    }
  },
  { rootMargin: "600px" },
);
