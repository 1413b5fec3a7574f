// Requests to the server: the models that it has, and replies as they are written.

const KEY = "mllama-key";
const LARGE = 48 << 20; // bytes of a request that a server may refuse before it has read them

// An error whose message may be shown. status: HTTP's, 0 if there was no answer.
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // Kept for this page alone.
  }
  ownKey = key;
}

let ownKey = "";
try {
  ownKey = sessionStorage.getItem(KEY) ?? "";
} catch {
  // A browser that keeps nothing.
}

function headers(more = {}) {
  return ownKey ? { ...more, Authorization: `Bearer ${ownKey}` } : more;
}

export const hasKey = () => ownKey !== "";

// The answer to a request. Throws ApiError, or AbortError.
async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const length = options.body?.length ?? 0;
    throw new ApiError(
      length > LARGE
        ? `The server closed the connection. The question and its images have ${Math.round(length / 1e6)} MB; ` +
          "fewer images, or a new conversation, may help."
        : "The server cannot be reached. Is mllama serve still running?",
    );
  }
  if (answer.ok) return answer;
  let words = "";
  try {
    words = (await answer.json()).error;
  } catch {
    // No JSON: what is before the server answered.
  }
  words = typeof words === "string" && words ? words : `The server answered ${answer.status} ${answer.statusText}`.trim();
  const seconds = Number(answer.headers.get("Retry-After"));
  throw new ApiError(seconds > 0 ? `${words} (it asks to wait ${seconds} s)` : words, answer.status);
}

// [{name, sees}] of the models that the server offers, those in memory first.
export async function models() {
  const [tags, loaded] = await Promise.all([json("/api/tags"), json("/api/ps")]);
  const warm = new Set((loaded.models ?? []).map((one) => one.name));
  return (tags.models ?? [])
    .map((one) => ({ name: one.name, warm: warm.has(one.name), sees: one.capabilities?.includes("vision") ?? true }))
    .sort((a, b) => b.warm - a.warm);
}

async function json(path) {
  const answer = await ask(path);
  try {
    return await answer.json();
  } catch {
    throw new ApiError("The server's answer is not JSON. Does another program listen here?", answer.status);
  }
}

// The objects of a reply, as they come; the last has done: true. Throws ApiError, or AbortError if signal says so.
export async function* chat(body, signal) {
  const answer = await ask("/api/chat", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  let done = false;
  for await (const line of lines(answer.body)) {
    let object;
    try {
      object = JSON.parse(line);
    } catch {
      throw new ApiError("The server sent something that is not JSON.", answer.status);
    }
    if (typeof object.error === "string") throw new ApiError(object.error, answer.status);
    yield object;
    done = object.done === true;
  }
  if (!done) throw new ApiError("The connection ended before the answer did.");
}

// The lines of a stream of UTF-8.
async function* lines(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const found = rest.split("\n");
      rest = found.pop();
      yield* found.filter((line) => line.trim());
      if (done) break;
    }
    if (rest.trim()) yield rest;
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection to the server broke off.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
