// Images come in: chosen, photographed, dropped, pasted. And the images of the next question.

import { take } from "./images.js";

const byId = (id) => document.getElementById(id);
const tray = byId("tray");

export const images = [];
let changed = () => {};
let say = () => {};
let counted = () => 0;

// onChange(): images were added or removed; notice(words); nBefore(): images in the conversation
export function setUp({ onChange, notice, nBefore }) {
  changed = onChange;
  say = notice;
  counted = nBefore;
  for (const button of document.querySelectorAll("[data-pick]")) {
    button.addEventListener("click", () => byId(button.dataset.pick).click());
  }
  for (const input of [byId("files"), byId("camera")]) {
    input.addEventListener("change", () => {
      add(input.files);
      input.value = "";
    });
  }
  document.addEventListener("paste", (event) => {
    const data = event.clipboardData;
    // Programs for texts put an image of the text beside it: the text is meant.
    if (!data?.files.length || (data.getData("text/plain") && event.target.localName === "textarea")) return;
    event.preventDefault();
    add(data.files);
  });
  setUpDrop();
}

function setUpDrop() {
  const veil = byId("drop");
  let depth = 0;
  const holds = (event) => [...(event.dataTransfer?.types ?? [])].some((type) => type === "Files" || type === "text/uri-list");
  document.addEventListener("dragenter", (event) => {
    if (!holds(event)) return;
    event.preventDefault();
    depth += 1;
    veil.hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!holds(event)) return;
    depth = Math.max(0, depth - 1);
    veil.hidden = depth === 0;
  });
  document.addEventListener("dragover", (event) => {
    if (!holds(event)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
  });
  document.addEventListener("drop", (event) => {
    depth = 0;
    veil.hidden = true;
    if (!holds(event)) return;
    event.preventDefault();
    if (event.dataTransfer.files.length) add(event.dataTransfer.files);
    else say("That was an address, no file. Save the image first, then drop the file.");
  });
}

function add(files) {
  const { found, words } = take(files, counted() + images.length);
  put(found);
  say(words);
  if (found.length) byId("question").focus({ preventScroll: true });
}

// More images for the next question.
export function put(more) {
  images.push(...more);
  draw();
}

// Take the images out: they are asked about.
export function takeAll() {
  const all = images.splice(0);
  draw();
  return all;
}

function draw() {
  tray.replaceChildren(...images.map(tile));
  tray.hidden = images.length === 0;
  changed();
}

function tile(image, index) {
  const item = document.createElement("li");
  const button = byId("notice-close").cloneNode(true);
  button.removeAttribute("id");
  button.className = "remove round";
  button.setAttribute("aria-label", `Remove ${image.name}`);
  button.title = "Remove";
  button.addEventListener("click", () => {
    images.splice(images.indexOf(image), 1);
    draw();
    const next = tray.querySelectorAll("button")[Math.min(index, images.length - 1)];
    (next ?? byId("question")).focus();
  });
  item.append(image.view(), button);
  return item;
}
