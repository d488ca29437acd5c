"""Asks a server what the `openai` package asks: OPENAI_BASE_URL says where it is.

Exits with 77 if the package is not installed.
"""

import json
import os
import sys

try:
    import openai
except ImportError:
    sys.exit(77)

client = openai.OpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key="secret", max_retries=0)
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "What is one and one?"}]

whole = client.chat.completions.create(
    model=model, messages=messages, max_tokens=12, seed=1, logprobs=True, top_logprobs=2
)
assert whole.usage.completion_tokens <= 12
assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
pieces = client.chat.completions.create(
    model=model, messages=messages, max_tokens=12, seed=1, stream=True,
    stream_options={"include_usage": True},
)
text, usage = "", None
for piece in pieces:
    usage = piece.usage or usage
    for choice in piece.choices:
        text += choice.delta.content or ""
assert text == whole.choices[0].message.content, (text, whole)
assert usage.completion_tokens == whole.usage.completion_tokens

schema = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["answer"],
    "additionalProperties": False,
}
formatted = client.chat.completions.create(
    model=model, messages=messages, temperature=0.5, seed=2, max_tokens=400,
    response_format={"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}},
)
if formatted.choices[0].finish_reason == "stop":
    assert 0 <= json.loads(formatted.choices[0].message.content)["answer"] <= 99

tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
called = client.chat.completions.create(
    model=model, messages=messages, seed=3, max_tokens=400, tools=[tool], tool_choice="required"
)
call = called.choices[0].message.tool_calls[0].function
assert call.name == "add" and 0 <= json.loads(call.arguments)["answer"] <= 99

scored = client.completions.create(model=model, prompt=[[5, 6, 7]], max_tokens=0, echo=True, logprobs=1)
assert len(scored.choices[0].logprobs.token_logprobs) == 3

response = client.responses.create(model=model, input="One and one?", max_output_tokens=8)
assert client.responses.retrieve(response.id).output_text == response.output_text
names = [
    event.type
    for event in client.responses.create(model=model, input="Two?", max_output_tokens=8, stream=True)
]
assert names[0] == "response.created", names
assert names[-1] in ("response.completed", "response.incomplete"), names

vectors = client.embeddings.create(model=model, input=["a boat", "a bridge"])
assert len(vectors.data) == 2 and abs(sum(x * x for x in vectors.data[0].embedding) - 1) < 1e-3

try:
    client.chat.completions.create(model=model, messages=messages, temperature="hot")
    raise SystemExit("a wrong temperature was taken")
except openai.BadRequestError as error:
    assert error.param == "temperature", error
try:
    openai.OpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key="no", max_retries=0).models.list()
    raise SystemExit("a wrong key was taken")
except openai.AuthenticationError:
    pass
print("the openai client is content")
