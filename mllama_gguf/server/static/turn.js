// One question and its answer on the page.

import { render } from "./markup.js";

const template = document.getElementById("turn-template");

function seconds(value) {
  return value < 10 ? `${value.toFixed(1)} s` : value < 120 ? `${Math.round(value)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

// What the last object of a reply says about its cost: seconds, tokens, tokens a second.
export function figures(last) {
  const found = [seconds((last.total_duration ?? 0) / 1e9)];
  const count = last.eval_count ?? 0;
  found.push(`${count} ${count === 1 ? "token" : "tokens"}`);
  const each = (last.eval_duration ?? 0) / 1e9;
  if (count && each > 0) {
    const speed = count / each;
    found.push(`${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tokens/s`);
  }
  return found;
}

export class Turn {
  // actions: {show(image), again(turn), edit(turn), copy(text)}
  constructor(question, images, format, actions) {
    this.question = question;
    this.images = images;
    this.format = format;
    this.text = "";
    this.state = "new"; // new, waiting, writing, done, stopped, failed
    this.element = template.content.cloneNode(true).firstElementChild;
    const find = (name) => this.element.querySelector(name);
    this.parts = Object.fromEntries(
      ["text", "state", "doing", "problem", "figures", "copy", "edit", "again"].map((name) => [name, find(`.${name}`)]),
    );
    find(".question").textContent = question;
    const list = find(".images");
    list.hidden = images.length === 0;
    for (const image of images) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "image";
      button.title = image.name;
      button.setAttribute("aria-label", `Show ${image.name}`);
      button.append(image.view(""));
      button.addEventListener("click", () => actions.show(image));
      const item = document.createElement("li");
      item.append(button);
      list.append(item);
    }
    this.parts.again.addEventListener("click", () => actions.again(this));
    this.parts.edit.addEventListener("click", () => actions.edit(this));
    this.parts.copy.addEventListener("click", async () => {
      const label = this.parts.copy.querySelector("span");
      label.textContent = (await actions.copy(this.text)) ? "Copied" : "Not copied";
      setTimeout(() => (label.textContent = "Copy"), 1600);
    });
  }

  // Whether it is part of what the model is told with the next question.
  get counts() {
    return this.state === "done" || (this.state === "stopped" && this.text !== "");
  }

  get isOpen() {
    return this.state === "waiting" || this.state === "writing";
  }

  begin() {
    this.text = "";
    this.started = performance.now();
    this.parts.text.replaceChildren();
    this.#enter("waiting");
    clearInterval(this.timer);
    this.timer = setInterval(() => this.#tell(), 250);
  }

  add(text) {
    if (!text) return;
    this.text += text;
    if (this.state === "waiting") this.#enter("writing");
    this.frame ??= requestAnimationFrame(() => this.#draw());
  }

  end(last) {
    this.#enter("done");
    const found = figures(last);
    if (last.done_reason === "length") found.push("cut off: no room for more");
    this.parts.figures.textContent = found.join(" · ");
    if (!this.text) this.#say("The model wrote nothing.");
  }

  stop() {
    this.#enter("stopped");
    this.parts.figures.textContent = `Stopped after ${seconds((performance.now() - this.started) / 1000)}`;
    if (!this.text) this.parts.figures.textContent += ", before the first word";
  }

  fail(words) {
    this.#enter("failed");
    this.#say(words);
    this.parts.figures.textContent = "This question is not part of the conversation.";
  }

  // Whether it may be asked again: the last one may.
  offer(isLast) {
    const isIdle = !this.isOpen;
    this.parts.again.hidden = !(isLast && isIdle);
    this.parts.edit.hidden = !(isLast && isIdle);
  }

  #enter(state) {
    this.state = state;
    this.element.dataset.state = state;
    this.element.setAttribute("aria-busy", String(this.isOpen));
    this.parts.copy.hidden = this.isOpen || this.text === "";
    this.parts.problem.hidden = true;
    this.parts.state.hidden = !this.isOpen;
    if (state === "waiting") this.parts.figures.textContent = "";
    if (!this.isOpen) {
      clearInterval(this.timer);
      this.#draw();
    }
    this.#tell();
  }

  #say(words) {
    this.parts.problem.textContent = words;
    this.parts.problem.hidden = false;
  }

  #tell() {
    if (!this.isOpen) return;
    const passed = (performance.now() - this.started) / 1000;
    const looks = this.images.length > 1 ? "Looking at the images" : this.images.length ? "Looking at the image" : "Thinking";
    const words = this.state === "writing" ? "Writing" : looks;
    this.parts.doing.textContent = passed < 2 ? words : `${words} · ${seconds(Math.floor(passed)).replace(".0", "")}`;
  }

  #draw() {
    if (this.frame) cancelAnimationFrame(this.frame);
    this.frame = null;
    if (this.format === undefined) {
      this.parts.text.replaceChildren(...render(this.text));
    } else {
      const box = document.createElement("pre");
      box.textContent = this.text;
      box.tabIndex = 0;
      this.parts.text.replaceChildren(...(this.text ? [box] : []));
    }
    this.onDraw?.();
  }
}
