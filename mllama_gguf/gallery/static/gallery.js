"use strict";
(() => {
  const BLOCK = 64; // as in page.py
  const KINDS = [
    ["all", "All", () => true],
    ["done", "Captioned", (one) => one.caption !== "" && !one.error],
    ["cut", "Cut off", (one) => Boolean(one.cut)],
    ["failed", "Failed", (one) => Boolean(one.error)],
    ["none", "No caption", (one) => one.caption === "" && !one.error],
    ["unseen", "Not shown", (one) => Boolean(one.unseen)],
  ];
  const byId = (id) => document.getElementById(id);
  const entries = JSON.parse(byId("entries").textContent);
  const cards = byId("cards");
  const viewer = byId("viewer");
  const find = byId("find");
  let kind = KINDS[0];
  let shown = []; // numbers of the entries that the filter lets through
  let current = 0;

  const make = (name, className, text) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // The blocks of base64 that were read last.
  const blocks = new Map();
  const address = (number) => {
    const id = Math.floor(number / BLOCK);
    let lines = blocks.get(id);
    if (!lines) {
      lines = byId(`images-${id}`).textContent.split("\n");
      if (blocks.size > 8) blocks.delete(blocks.keys().next().value);
      blocks.set(id, lines);
    }
    return `data:image/jpeg;base64,${lines[number % BLOCK]}`;
  };

  const imageElement = (number, alt) => {
    const image = make("img");
    image.decoding = "async";
    image.alt = alt;
    image.addEventListener("load", () => {
      const ratio = image.naturalWidth / image.naturalHeight;
      image.classList.toggle("whole", ratio < 1.2 || ratio > 1.51); // too much would be cut off
    });
    image.src = address(number);
    return image;
  };

  const gone = (one) => {
    const box = make("span", "gone");
    const icon = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
    icon.setAttribute("class", "icon");
    icon.setAttribute("aria-hidden", "true");
    use.setAttribute("href", "#i-image");
    icon.append(use);
    box.append(icon, make("span", "", one.unseen === "missing" ? "The image is missing" : one.unseen));
    return box;
  };

  // An object of JSON as pairs of words; null for any other caption.
  const pairs = (caption) => {
    if (!caption.startsWith("{")) return null;
    let value;
    try { value = JSON.parse(caption); } catch { return null; }
    const words = (part) => {
      if (Array.isArray(part) && part.every((item) => typeof item !== "object")) return part.join(", ");
      return typeof part === "object" ? JSON.stringify(part) : String(part);
    };
    return Object.entries(value).map(([name, part]) => [name, words(part)]);
  };

  const needle = () => find.value.trim().toLowerCase().split(/\s+/).filter(Boolean);

  const fill = (card, number) => {
    const one = entries[number];
    const frame = make("span", "frame");
    frame.append(one.unseen ? gone(one) : imageElement(number, ""));
    const parts = pairs(one.caption);
    const text = make("span", one.error ? "text error" : "text");
    text.dir = "auto";
    text.textContent = one.error || (parts ? parts.map((pair) => pair.join(": ")).join("\n") : one.caption) || "No caption";
    const name = make("span", "name");
    const bdi = make("bdi", "", one.name);
    name.append(bdi);
    if (one.cut) name.append(make("span", "note", "cut off"));
    if (one.same) name.append(make("span", "note", `same as ${one.same}`));
    card.replaceChildren(frame, text, name);
  };

  // A card gets its content when it comes near the window.
  const watcher = new IntersectionObserver((changes) => {
    for (const change of changes) {
      if (!change.isIntersecting) continue;
      watcher.unobserve(change.target);
      fill(change.target.firstChild, Number(change.target.dataset.number));
    }
  }, { rootMargin: "800px" });

  const items = entries.map((one, number) => {
    const item = make("li");
    item.dataset.number = number;
    const card = make("button", "card");
    card.type = "button";
    card.append(make("span", "frame"), make("span", "name", one.name));
    item.append(card);
    watcher.observe(item);
    return item;
  });
  const haystacks = entries.map((one) => `${one.name}\n${one.caption}\n${one.error || ""}`.toLowerCase());
  cards.append(...items);

  const filter = () => {
    const words = needle();
    shown = [];
    items.forEach((item, number) => {
      const fits = kind[2](entries[number]) && words.every((word) => haystacks[number].includes(word));
      item.hidden = !fits;
      if (fits) shown.push(number);
    });
    const all = `${entries.length} ${entries.length === 1 ? "image" : "images"}`;
    byId("count").textContent = shown.length === entries.length ? all : `${shown.length} of ${all}`;
    byId("nothing").hidden = shown.length > 0;
  };

  const buttons = KINDS.map((one) => {
    const n = entries.filter(one[2]).length;
    if (!n || (one !== KINDS[0] && n === entries.length)) return null;
    const button = make("button", "", one === KINDS[0] ? one[1] : `${one[1]} ${n}`);
    button.type = "button";
    button.addEventListener("click", () => {
      kind = one;
      for (const other of buttons) other?.setAttribute("aria-pressed", String(other === button));
      filter();
    });
    button.setAttribute("aria-pressed", String(one === kind));
    return button;
  });
  if (buttons.filter(Boolean).length > 1) byId("kinds").append(...buttons.filter(Boolean));

  const view = (number) => {
    const one = entries[number];
    current = number;
    byId("name").replaceChildren(make("bdi", "", one.name));
    byId("seen").replaceChildren(one.unseen ? gone(one) : imageElement(number, one.name));
    const words = byId("words");
    words.dir = "auto";
    words.className = one.error ? "error" : "";
    const parts = one.error ? null : pairs(one.caption);
    if (parts) {
      const list = make("dl");
      for (const [name, value] of parts) list.append(make("dt", "", name), make("dd", "", value));
      words.replaceChildren(list);
    } else {
      words.textContent = one.error || one.caption || "No caption";
    }
    const link = byId("open");
    link.hidden = !one.link;
    if (one.link) link.href = one.link;
    if (!viewer.open) viewer.showModal();
  };

  const step = (by) => {
    const at = shown.indexOf(current) + by;
    if (at >= 0 && at < shown.length) view(shown[at]);
  };

  cards.addEventListener("click", (event) => {
    const item = event.target.closest("li");
    if (item) view(Number(item.dataset.number));
  });
  byId("before").addEventListener("click", () => step(-1));
  byId("after").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("close", () => {
    const card = items[current].firstChild;
    card.scrollIntoView({ block: "nearest" });
    card.focus({ preventScroll: true });
  });
  document.addEventListener("keydown", (event) => {
    if (viewer.open && event.key === "ArrowLeft") step(-1);
    else if (viewer.open && event.key === "ArrowRight") step(1);
    else if (!viewer.open && event.key === "/" && document.activeElement !== find) {
      event.preventDefault();
      find.focus();
    } else if (!viewer.open && event.key === "Escape" && find.value) {
      find.value = "";
      filter();
    }
  });
  let timer;
  find.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(filter, 80);
  });
  filter();
})();
