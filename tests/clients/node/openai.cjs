// Asks a server through the package `openai` of npm. Prints what it was told as JSON.
// node openai.cjs ADDRESS PICTURE SCHEMA
const { OpenAI } = require("openai");
const fs = require("fs");

const [host, picture, schema] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${host}/v1`, apiKey: "unused", maxRetries: 0 });
const model = "llama3.2-vision";
const url = `data:image/png;base64,${fs.readFileSync(picture).toString("base64")}`;
const text = "Describe this image.";
const messages = [{ role: "user", content: [{ type: "image_url", image_url: { url } }, { type: "text", text }] }];

async function main() {
  const told = {};
  told.models = (await client.models.list()).data.map((one) => one.id);
  told.whole = (await client.chat.completions.create({ model, messages, temperature: 0 })).choices[0].message.content;
  told.pieces = [];
  for await (const part of await client.chat.completions.create({ model, messages, temperature: 0, stream: true }))
    told.pieces.push(part.choices[0].delta.content ?? "");
  const form = { type: "json_schema", json_schema: { name: "fruit", schema: JSON.parse(schema), strict: true } };
  told.form = (await client.chat.completions.create({ model, messages, temperature: 0, response_format: form })).choices[0].message.content;
  const input = [{ role: "user", content: [{ type: "input_image", image_url: url, detail: "auto" }, { type: "input_text", text }] }];
  told.response = (await client.responses.create({ model, input, temperature: 0 })).output_text;
  try {
    await client.chat.completions.create({ model: "gpt-5", messages });
  } catch (error) {
    told.unknown = { name: error.constructor.name, status: error.status, code: error.code, message: error.message };
  }
  console.log(JSON.stringify(told));
}

main();
