// Elements: how they are found, made and spoken of.

const ASKED_MS = 5_000;

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function button(label, act, className = "small") {
  const made = make("button", { type: "button", className, textContent: label });
  if (act) made.addEventListener("click", () => act(made));
  return made;
}

// The prompt of a task in a list, and what its buttons are about.
export function named(row, prompt, task) {
  prompt.id = `prompt-${task.id}`;
  prompt.dir = "auto";
  for (const one of row.children) one.setAttribute("aria-describedby", prompt.id);
}

// What cannot be undone takes a second press, within a few seconds. The question may be found out
// first; without one, nothing is done.
export function askTwice(element, act, question = () => "Really delete?") {
  const label = element.textContent;
  let timer = null;
  let isAsking = false;
  element.calm = () => {
    clearTimeout(timer);
    timer = null;
    element.textContent = label;
  };
  element.addEventListener("blur", element.calm);
  element.addEventListener("click", async (event) => {
    if (event.detail > 1 || isAsking) return; // The second half of a double click.
    if (timer !== null) {
      element.calm();
      act();
      return;
    }
    isAsking = true;
    const text = await question();
    isAsking = false;
    if (!text) return;
    element.textContent = text;
    say(text);
    timer = setTimeout(element.calm, ASKED_MS);
  });
  return element;
}

export function say(text) {
  $("live").append(make("p", { textContent: text }));
  while ($("live").children.length > 3) $("live").firstChild.remove();
}
