// The page: a conversation about images with a model of this server.

import { ApiError, chat, hasKey, models, setKey } from "./api.js";
import * as form from "./form.js";
import * as intake from "./intake.js";
import { Turn } from "./turn.js";

const byId = (id) => document.getElementById(id);
const DEFAULT_QUESTION = "Describe this image.";
const DEFAULT_QUESTIONS = "Describe these images.";

const question = byId("question");
const select = byId("model");
const talk = byId("talk");
const turns = [];
let writing = null; // {controller, turn} of the reply that is being written
let offered = [];
let isFinding = false; // the server is asked for its models
let isWanted = false; // the question is to be sent as soon as they are known

// ---- small things

function kept(name, value) {
  try {
    if (value === undefined) return localStorage.getItem(name);
    if (value === null) localStorage.removeItem(name);
    else localStorage.setItem(name, value);
  } catch {
    // A browser that keeps nothing.
  }
  return null;
}

function tell(words) {
  byId("status").textContent = words;
}

// A note above the question; null: none. act: {name, run} of its button
function notice(words, act = null) {
  const box = byId("notice");
  box.hidden = !words;
  box.querySelector("p").textContent = words ?? "";
  const button = byId("notice-act");
  button.hidden = !act;
  button.textContent = act?.name ?? "";
  button.onclick = act?.run ?? null;
}

const nearEnd = () => window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 140;

function toEnd(isSmooth = false) {
  window.scrollTo({ top: document.documentElement.scrollHeight, behavior: isSmooth ? "smooth" : "instant" });
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // No clipboard outside https and this machine: the old way.
    const box = document.createElement("textarea");
    box.value = text;
    box.className = "unseen";
    document.body.append(box);
    box.select();
    const isCopied = document.execCommand("copy");
    box.remove();
    if (!isCopied) return false;
  }
  tell("Copied.");
  return true;
}

// ---- theme

const THEMES = ["system", "light", "dark"];

function showTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const words = `Theme: ${theme === "system" ? "as the system" : theme}`;
  byId("theme").setAttribute("aria-label", words);
  byId("theme").title = words;
}

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % THEMES.length];
  kept("mllama-theme", theme === "system" ? null : theme);
  showTheme(theme);
}

// ---- the key

function askForKey() {
  const dialog = byId("key-dialog");
  byId("key-words").textContent = hasKey() ? "The server does not accept this key." : "";
  byId("key").value = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    byId("key-form").onsubmit = () => {
      setKey(byId("key").value.trim());
      resolve(true);
    };
    byId("key-cancel").onclick = () => dialog.close();
    // The event comes with the next frame: by then the dialog may be open again, for the next key.
    dialog.onclose = () => {
      if (!dialog.open) resolve(false);
    };
  });
}

// ---- models

async function findModels() {
  isFinding = true;
  try {
    offered = await models();
  } catch (error) {
    isFinding = isWanted = false;
    if (error.status === 401 && (await askForKey())) return findModels();
    select.replaceChildren(new Option(error.status === 401 ? "A key is needed" : "No answer", ""));
    notice(error.status === 401 ? "The server asks for a key." : words(error), { name: "Try again", run: findModels });
    showState();
    return undefined;
  }
  notice(null);
  select.replaceChildren(...offered.map((one) => new Option(one.name.replace(/:latest$/, ""), one.name)));
  if (!offered.length) {
    select.append(new Option("No model", ""));
    notice("The server has no model yet. Start it with one: mllama serve -m ollama:llama3.2-vision", {
      name: "Look again",
      run: findModels,
    });
  }
  const last = kept("mllama-model");
  if (offered.some((one) => one.name === last)) select.value = last;
  isFinding = false;
  showState();
  if (isWanted) send();
  return undefined;
}

// ---- asking

function words(error) {
  if (error instanceof ApiError || error.constructor === Error) return error.message;
  console.error(error);
  return "The page itself failed. Reload it and try again.";
}

function showState() {
  const isWriting = writing !== null;
  const hasTalk = turns.length > 0;
  byId("empty").hidden = hasTalk;
  talk.hidden = byId("talk-title").hidden = !hasTalk;
  byId("new").disabled = !hasTalk && !intake.images.length && !question.value;
  select.disabled = offered.length < 1 || isWriting;
  byId("send").hidden = isWriting;
  byId("stop").hidden = !isWriting;
  byId("send").disabled = !select.value || (!question.value.trim() && !intake.images.length);
  const many = intake.images.length > 1;
  question.placeholder = intake.images.length
    ? many ? DEFAULT_QUESTIONS : DEFAULT_QUESTION
    : hasTalk ? "Ask more about it" : "Ask about an image";
  turns.forEach((turn, i) => turn.offer(i === turns.length - 1 && !isWriting));
  document.body.classList.toggle("ready", intake.images.length > 0);
}

// The conversation as the API wants it.
async function messages(asked) {
  const found = [];
  for (const turn of [...turns.filter((one) => one !== asked && one.counts), asked]) {
    const images = await Promise.all(turn.images.map((image) => image.base64()));
    found.push({ role: "user", content: turn.question, ...(images.length ? { images } : {}) });
    if (turn !== asked) found.push({ role: "assistant", content: turn.text });
  }
  return found;
}

async function reply(turn) {
  wasNear = true;
  const controller = new AbortController();
  writing = { controller, turn };
  turn.begin();
  showState();
  toEnd();
  tell("The model is asked.");
  try {
    const body = { model: turn.model, messages: await messages(turn), stream: true };
    if (turn.format !== undefined) body.format = turn.format;
    controller.signal.throwIfAborted();
    for await (const object of chat(body, controller.signal)) {
      turn.add(object.message?.content ?? "");
      if (object.done) turn.end(object);
    }
    tell("The answer is complete.");
  } catch (error) {
    if (error.name === "AbortError") {
      turn.stop();
      tell("Stopped.");
    } else if (error.status === 401 && (await askForKey())) {
      return reply(turn);
    } else {
      turn.fail(error.status === 401 ? "The server asks for a key." : words(error));
      tell("");
    }
  }
  writing = null;
  showState();
  if (wasNear) toEnd();
  return undefined;
}

function send() {
  isWanted = isFinding && question.value.trim() !== "";
  if (writing || byId("send").disabled) return;
  const { format, error } = form.format();
  if (error) return void form.showError();
  const images = intake.takeAll();
  const text = question.value.trim() || (images.length > 1 ? DEFAULT_QUESTIONS : DEFAULT_QUESTION);
  question.value = "";
  grow();
  notice(null);
  kept("mllama-model", select.value);
  const turn = new Turn(text, images, format, { show, again, edit, copy });
  turn.model = select.value;
  turn.onDraw = () => (wasNear ? toEnd() : null);
  turns.push(turn);
  talk.append(turn.element);
  reply(turn);
}

function again(turn) {
  if (writing) return;
  turn.model = select.value || turn.model;
  reply(turn);
  question.focus();
}

// Its question and images go back to where one writes; the turn goes away.
function edit(turn) {
  if (writing) return;
  turns.splice(turns.indexOf(turn), 1);
  turn.element.remove();
  intake.put(turn.images);
  question.value = turn.question;
  grow();
  showState();
  question.focus();
}

function renew(images = []) {
  isWanted = false;
  writing?.controller.abort();
  turns.splice(0);
  talk.replaceChildren();
  intake.takeAll();
  intake.put(images);
  question.value = "";
  grow();
  notice(null);
  showState();
  question.focus();
}

// ---- an image, large

function show(image) {
  const dialog = byId("viewer");
  byId("viewer-name").textContent = image.name;
  dialog.querySelector(".viewer-space").replaceChildren(image.view());
  byId("viewer-ask").onclick = () => {
    dialog.close();
    renew([image]);
  };
  dialog.showModal();
}

// ---- the question

function grow() {
  question.rows = 1;
  const style = getComputedStyle(question);
  const spare = parseFloat(style.paddingTop) + parseFloat(style.paddingBottom);
  question.rows = Math.min(8, Math.max(1, Math.round((question.scrollHeight - spare) / parseFloat(style.lineHeight))));
}

let wasNear = true;
const isTouch = matchMedia("(pointer: coarse)");

function keys(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !isTouch.matches) {
    event.preventDefault();
    send();
  }
}

function setUp() {
  showTheme(document.documentElement.dataset.theme ?? "system");
  form.setUp();
  intake.setUp({
    onChange: showState,
    notice,
    nBefore: () => turns.filter((one) => one.counts).reduce((sum, one) => sum + one.images.length, 0),
  });
  byId("theme").addEventListener("click", nextTheme);
  byId("new").addEventListener("click", () => renew());
  byId("notice-close").addEventListener("click", () => notice(null));
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => {
    writing?.controller.abort();
    question.focus();
  });
  byId("down").addEventListener("click", () => toEnd(true));
  question.addEventListener("keydown", keys);
  question.addEventListener("input", () => {
    isWanted = false; // there is more to say
    grow();
    showState();
  });
  for (const idea of document.querySelectorAll(".idea")) {
    idea.addEventListener("click", () => {
      question.value = idea.textContent;
      grow();
      showState();
      if (intake.images.length) send();
      else byId("files").click();
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && writing && !document.querySelector("dialog[open]")) writing.controller.abort();
  });
  byId("viewer-close").addEventListener("click", () => byId("viewer").close());
  byId("viewer").addEventListener("click", (event) => {
    if (event.target === event.currentTarget || event.target.className === "viewer-space") event.currentTarget.close();
  });
  addEventListener("scroll", () => {
    wasNear = nearEnd();
    byId("down").hidden = wasNear || !turns.length;
  }, { passive: true });
  select.addEventListener("change", showState);
  showState();
  findModels();
  if (!isTouch.matches) question.focus({ preventScroll: true });
}

setUp();
