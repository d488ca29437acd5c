// Asks a server what the `openai` package for Node asks: BASE_URL says where it is, and
// NODE_PACKAGES where the package is installed. Exits with 77 if it is not.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

let OpenAI;
try {
  const require = createRequire(`${process.env.NODE_PACKAGES ?? "."}/`);
  ({ OpenAI } = require("openai"));
} catch {
  process.exit(77);
}

const baseURL = `${process.env.BASE_URL}/v1`;
const client = new OpenAI({ baseURL, apiKey: "secret", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "What is one and one?" }];
const schema = {
  type: "object",
  properties: { answer: { type: "integer", minimum: 0, maximum: 99 } },
  required: ["answer"],
  additionalProperties: false,
};

const whole = await client.chat.completions.create({ model, messages, max_tokens: 12, seed: 1 });
let text = "", usage = null;
const stream = await client.chat.completions.create({
  model, messages, max_tokens: 12, seed: 1, stream: true, stream_options: { include_usage: true },
});
for await (const piece of stream) {
  usage = piece.usage ?? usage;
  text += piece.choices[0]?.delta?.content ?? "";
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(usage.total_tokens, whole.usage.total_tokens);

const format = { type: "json_schema", json_schema: { name: "sum", schema } };
const made = await client.chat.completions.create({
  model, messages, seed: 2, max_tokens: 400, response_format: format,
});
assert.ok(JSON.parse(made.choices[0].message.content).answer <= 99);

const tools = [{ type: "function", function: { name: "add", parameters: schema } }];
const calling = { model, messages, tools, tool_choice: "required", seed: 3, max_tokens: 400 };
const called = await client.chat.completions.create(calling);
const call = called.choices[0].message.tool_calls[0].function;
assert.equal(call.name, "add");
const runner = client.chat.completions.stream(calling);
const final = await runner.finalChatCompletion();
assert.equal(final.choices[0].message.tool_calls[0].function.arguments, call.arguments);

const response = await client.responses.create({ model, input: "One?", max_output_tokens: 8 });
assert.equal((await client.responses.retrieve(response.id)).output_text, response.output_text);
const names = [];
const events = await client.responses.create({
  model, input: "Two?", max_output_tokens: 8, stream: true,
});
for await (const event of events) names.push(event.type);
assert.equal(names[0], "response.created");

const scored = await client.completions.create({
  model, prompt: [5, 6, 7], max_tokens: 0, echo: true, logprobs: 1,
});
assert.equal(scored.choices[0].logprobs.token_logprobs.length, 3);
const vectors = await client.embeddings.create({ model, input: "a boat" });
const squares = vectors.data[0].embedding.map((x) => x * x);
assert.ok(Math.abs(squares.reduce((a, b) => a + b) - 1) < 1e-3);

const wrong = client.chat.completions.create({ model, messages, temperature: "hot" });
await assert.rejects(wrong, (error) => error.status === 400 && error.param === "temperature");
// A client that leaves in the middle is no trouble for the next one.
const left = await client.chat.completions.create({
  model, messages, max_tokens: 500, stream: true, stop: [],
});
for await (const _ of left) break;
await client.models.retrieve(model);
console.log("the openai client for Node is content");
