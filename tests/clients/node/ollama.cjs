// Asks a server through the package `ollama` of npm. Prints what it was told as JSON.
// node ollama.cjs ADDRESS PICTURE SCHEMA
const { Ollama } = require("ollama");
const fs = require("fs");

const [host, picture, schema] = process.argv.slice(2);
const client = new Ollama({ host });
const model = "llama3.2-vision";
const options = { temperature: 0 };
const question = (image) => [{ role: "user", content: "Describe this image.", images: [image] }];

async function caught(call) {
  try {
    const answer = await call();
    if (answer && answer[Symbol.asyncIterator]) for await (const _ of answer);
    return null;
  } catch (error) {
    return { name: error.name, message: error.message, status: error.status_code ?? null };
  }
}

async function main() {
  const told = {};
  told.models = (await client.list()).models.map((one) => one.name);
  told.capabilities = (await client.show({ model })).capabilities;
  told.version = (await client.version()).version;
  const messages = question(fs.readFileSync(picture).toString("base64"));
  const whole = await client.chat({ model, messages, options });
  told.whole = whole.message.content;
  told.counts = [whole.prompt_eval_count, whole.eval_count];
  told.path = (await client.chat({ model, messages: question(new Uint8Array(fs.readFileSync(picture))), options })).message.content;
  told.pieces = [];
  for await (const part of await client.chat({ model, messages, options, stream: true })) told.pieces.push(part.message.content);
  told.response = (await client.generate({ model, prompt: "Describe this image.", images: messages[0].images, options })).response;
  told.form = (await client.chat({ model, messages, options, format: JSON.parse(schema) })).message.content;
  told.pull = (await client.pull({ model })).status;
  told.steps = [];
  for await (const step of await client.pull({ model, stream: true })) told.steps.push(step.status);
  told.kept = (await client.generate({ model, prompt: "", keep_alive: "10m" })).done_reason;
  told.running = (await client.ps()).models.map((one) => one.name);
  told.unknown = await caught(() => client.chat({ model: "nobody", messages }));
  told.unknownStream = await caught(() => client.chat({ model: "nobody", messages, stream: true }));
  told.noPicture = await caught(() => client.chat({ model, messages: question("bm8gcGljdHVyZQ=="), options }));
  told.embed = await caught(() => client.embed({ model, input: "x" }));

  // A reader who stops: the stream ends with an AbortError, and the next request is answered.
  const long = await client.generate({ model, prompt: "x", stream: true, format: { type: "string", minLength: 9000 } });
  told.abort = await caught(async () => {
    for await (const _ of long) long.abort();
  });
  told.afterwards = (await client.chat({ model, messages, options })).message.content;
  console.log(JSON.stringify(told));
}

main();
