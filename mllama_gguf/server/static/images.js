// Images: the files as they are. Nothing is scaled or converted, so that the model sees the pixels of the file.

const ENDINGS = /\.(jpe?g|jpe|png|gif|webp|bmp|tiff?|heic|heif|avif|jxl|jp2|ico|mpo)$/i;
const MOST = 16; // images in one request

export class InputImage {
  constructor(file) {
    this.file = file;
    this.name = file.name || "Pasted image";
    this.url = URL.createObjectURL(file);
    this.text = null;
  }

  // The bytes of the file in base64.
  base64() {
    this.text ??= new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
      reader.onerror = () => {
        this.text = null;
        reject(new Error(`${this.name} cannot be read. Was the file moved or changed?`));
      };
      reader.readAsDataURL(this.file);
    });
    return this.text;
  }

  // An element that shows it; its kind and name if the browser cannot.
  view(alt = this.name) {
    const image = document.createElement("img");
    image.src = this.url;
    image.alt = alt;
    image.draggable = false;
    image.decoding = "async";
    image.addEventListener("error", () => image.replaceWith(this.#placeholder()), { once: true });
    return image;
  }

  #placeholder() {
    const box = document.createElement("span");
    box.className = "unshown";
    box.title = "The browser cannot show this kind of image. It is sent as it is.";
    const kind = document.createElement("b");
    kind.textContent = (/\.(\w{1,5})$/.exec(this.name)?.[1] ?? "file").toUpperCase();
    const name = document.createElement("span");
    name.textContent = this.name;
    box.append(kind, name);
    return box;
  }
}

// The images among files, and words about those that are none, or null.
export function take(files, nKept) {
  const found = [];
  const others = [];
  const rest = [];
  for (const file of files) {
    const isImage = file.type.startsWith("image/") ? file.type !== "image/svg+xml" : ENDINGS.test(file.name);
    if (!isImage) others.push(file.name || "What was pasted");
    else if (file.size === 0) others.push(`${file.name} (empty)`);
    else if (nKept + found.length >= MOST) rest.push(file.name);
    else found.push(new InputImage(file));
  }
  const words = [];
  if (others.length) words.push(`Not ${others.length > 1 ? "images" : "an image"}: ${some(others)}.`);
  if (rest.length) words.push(`A conversation takes ${MOST} images; left out: ${some(rest)}.`);
  return { found, words: words.join(" ") || null };
}

function some(names) {
  return names.slice(0, 3).join(", ") + (names.length > 3 ? ` and ${names.length - 3} more` : "");
}
