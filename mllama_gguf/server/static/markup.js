// Text of a model as elements: paragraphs, lists, headings, code, bold. Every word goes in as text, so that nothing that
// an image makes the model write can become an element of another kind.

const ITEM = /^(\s*)([-*•+]|\d{1,3}[.)])\s+(.*)$/;
const INLINE = /(`[^`\n]+`)|(\*\*[^\s*](?:[^\n]*?[^\s])?\*\*)/g;

function element(name, ...inside) {
  const made = document.createElement(name);
  made.append(...inside);
  return made;
}

// Words with **bold** and `code`.
function inline(text) {
  const parts = [];
  let start = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > start) parts.push(text.slice(start, match.index));
    if (match[1]) parts.push(element("code", match[1].slice(1, -1)));
    else parts.push(element("strong", match[2].slice(2, -2)));
    start = match.index + match[0].length;
  }
  if (start < text.length) parts.push(text.slice(start));
  return parts;
}

// The elements of a text.
export function render(text) {
  const found = [];
  let paragraph = [];
  let list = null;
  let fence = null;
  const close = () => {
    if (paragraph.length) {
      const made = element("p");
      paragraph.forEach((line, i) => made.append(...(i ? ["\n"] : []), ...inline(line)));
      found.push(made);
    }
    paragraph = [];
  };
  for (const line of text.split("\n")) {
    if (fence) {
      if (/^\s*```\s*$/.test(line)) fence = null;
      else fence.textContent += (fence.textContent ? "\n" : "") + line;
      continue;
    }
    const item = ITEM.exec(line);
    const heading = /^#{1,6}\s+(.+?)\s*#*$/.exec(line);
    if (/^\s*```/.test(line)) {
      close();
      list = null;
      fence = element("code");
      found.push(element("pre", fence));
    } else if (heading) {
      close();
      list = null;
      const made = element("h3", ...inline(heading[1].replaceAll("**", "")));
      found.push(made);
    } else if (item) {
      close();
      const name = /\d/.test(item[2]) ? "ol" : "ul";
      // One level of lists in lists: models write no more.
      const outer = item[1].length > 1 ? list?.lastElementChild : null;
      const last = outer ? outer.lastElementChild : list;
      let into = last?.localName === name ? last : null;
      if (!into) {
        into = element(name);
        if (name === "ol") into.start = parseInt(item[2], 10);
        if (outer) outer.append(into);
        else found.push((list = into));
      }
      into.append(element("li", ...inline(item[3])));
    } else if (!line.trim()) {
      close();
    } else if (list && /^\s{2,}/.test(line) && !paragraph.length) {
      list.lastElementChild.append("\n", ...inline(line.trim()));
    } else {
      list = null;
      paragraph.push(line);
    }
  }
  close();
  return found;
}
