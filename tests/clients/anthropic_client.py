"""Asks a server what the `anthropic` package asks: BASE_URL says where it is.

Messages whole and streamed, tools, thinking, counting. Exits with 77 if the package is not
installed.
"""

import json
import os
import sys

try:
    import anthropic
except ImportError:
    sys.exit(77)

client = anthropic.Anthropic(base_url=os.environ["BASE_URL"], api_key="secret", max_retries=0)
model = os.environ["MODEL"]
messages = [{"role": "user", "content": [{"type": "text", "text": "What is one and one?"}]}]
schema = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["answer"],
    "additionalProperties": False,
}
tool = {"name": "add", "description": "Adds.", "input_schema": schema}
more = {"model": model, "messages": messages, "extra_body": {"seed": 1}}

whole = client.messages.create(max_tokens=10, system="Be brief.", **more)
assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 10, whole
count = client.messages.count_tokens(model=model, messages=messages, system="Be brief.")
cached = whole.usage.cache_read_input_tokens
assert count.input_tokens == whole.usage.input_tokens + cached, (count, whole)
with client.messages.stream(max_tokens=10, system="Be brief.", **more) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
assert text == whole.content[0].text and final.stop_reason == "max_tokens", (text, whole)
assert final.usage.output_tokens == 10

stopped = client.messages.create(max_tokens=200, stop_sequences=["e"], **more)
assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == "e", stopped

calling = {"max_tokens": 400, "tools": [tool], "tool_choice": {"type": "any"}, **more}
called = client.messages.create(**calling)
block = [block for block in called.content if block.type == "tool_use"][0]
assert called.stop_reason == "tool_use" and 0 <= block.input["answer"] <= 99, called
# The grammar lets the model write two calls, which it would not do by itself.
written = r'<tool_call>\{"name": "add", "arguments": \{"answer": [0-9]\}\}</tool_call>'
single = client.messages.create(
    model=model,
    messages=messages,
    max_tokens=400,
    tools=[tool],
    tool_choice={"type": "auto", "disable_parallel_tool_use": True},
    extra_body={"guided_regex": f"({written}){{2}}"},
)
assert [part.type for part in single.content].count("tool_use") == 1, single
assert single.stop_reason == "tool_use", single
kinds, pieces = [], []
with client.messages.stream(**calling) as stream:
    for event in stream:
        kinds.append(event.type)
        if event.type == "content_block_delta" and event.delta.type == "input_json_delta":
            pieces.append(event.delta.partial_json)
    final = stream.get_final_message()
assert final.content[0].input == block.input and len(pieces) > 1, pieces
assert json.loads("".join(pieces)) == block.input
assert kinds[0] == "message_start" and kinds[-1] == "message_stop", kinds
history = messages + [
    {"role": "assistant", "content": [block.model_dump(include={"type", "id", "name", "input"})]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": block.id, "content": "2"},
    ]},
]
client.messages.create(model=model, messages=history, max_tokens=2, tools=[tool])

thinking = {"type": "enabled", "budget_tokens": 1024}
asked = {"model": model, "messages": messages, "max_tokens": 12}
thought = client.messages.create(extra_body={"seed": 1, "thinking": thinking}, **asked)
assert thought.content[0].type == "thinking" and thought.content[0].thinking, thought

try:
    client.messages.create(model=model, messages=[], max_tokens=2)
    raise SystemExit("a request without messages was taken")
except anthropic.BadRequestError as error:
    assert "messages" in str(error), error
try:
    stranger = client.with_options(api_key="no")
    stranger.messages.create(model=model, messages=messages, max_tokens=2)
    raise SystemExit("a wrong key was taken")
except anthropic.AuthenticationError:
    pass
print("the anthropic client is content")
