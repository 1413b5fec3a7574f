// The form of the answer: text, JSON, or JSON by a schema.

const byId = (id) => document.getElementById(id);
const NAMES = { text: "Text", json: "JSON", schema: "Schema" };
const EXAMPLE = `{
  "type": "object",
  "properties": {
    "description": { "type": "string" },
    "colours": { "type": "array", "items": { "type": "string" } }
  },
  "required": ["description", "colours"]
}`;

const panel = byId("form");
const toggle = byId("form-toggle");
const schema = byId("schema");
const words = byId("schema-words");

const chosen = () => panel.querySelector("input:checked").value;

// {format} of the request, undefined for text; {error} if the schema is none.
export function format() {
  if (chosen() === "text") return { format: undefined };
  if (chosen() === "json") return { format: "json" };
  let value;
  try {
    value = JSON.parse(schema.value);
  } catch (error) {
    return { error: `This is not JSON yet: ${error.message}` };
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    return { error: "A schema is a JSON object: it starts with { and ends with }." };
  }
  return { format: value };
}

// Open the box and put the cursor where the error is.
export function showError() {
  open(true);
  check();
  schema.focus();
}

function open(isOpen) {
  panel.hidden = !isOpen;
  toggle.setAttribute("aria-expanded", String(isOpen));
}

function check() {
  const isSchema = chosen() === "schema";
  const { error } = format();
  byId("schema-box").hidden = !isSchema;
  byId("form-name").textContent = NAMES[chosen()];
  toggle.classList.toggle("on", chosen() !== "text");
  if (isSchema && error) schema.setAttribute("aria-invalid", "true");
  else schema.removeAttribute("aria-invalid");
  words.textContent = isSchema ? (error ?? "The answer will obey this schema.") : "";
  words.classList.toggle("bad", Boolean(isSchema && error));
}

export function setUp() {
  schema.value = EXAMPLE;
  toggle.addEventListener("click", () => open(panel.hidden));
  panel.addEventListener("change", check);
  schema.addEventListener("input", check);
  panel.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    open(false);
    toggle.focus();
    event.stopPropagation();
  });
  check();
}
