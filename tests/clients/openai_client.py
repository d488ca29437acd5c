"""Asks a server what the `openai` package asks: BASE_URL says where it is.

Chat, streaming, tools, structured output, reasoning, completions, responses, embeddings, errors.
The model is small and knows nothing, so only the form of its answers is looked at. Exits with 77
if the package is not installed.
"""

import asyncio
import json
import os
import sys

try:
    import openai
except ImportError:
    sys.exit(77)

url = os.environ["BASE_URL"] + "/v1"
client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model
messages = [{"role": "user", "content": "What is one and one?"}]
schema = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["answer"],
    "additionalProperties": False,
}
tool = {"type": "function", "function": {"name": "add", "parameters": schema}}


def chat(**more):
    return client.chat.completions.create(model=model, messages=messages, **more)


def streamed(**more):
    """The pieces of a streamed chat: content, reasoning, calls by index, finish, usage."""
    text, thought, calls, finish, usage = "", "", {}, None, None
    for piece in chat(stream=True, stream_options={"include_usage": True}, **more):
        usage = piece.usage or usage
        for choice in piece.choices:
            finish = choice.finish_reason or finish
            text += choice.delta.content or ""
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or []:
                made = calls.setdefault(call.index, {"id": call.id, "name": "", "pieces": []})
                assert call.id is None or call.id == made["id"]
                made["name"] += call.function.name or ""
                made["pieces"].append(call.function.arguments or "")
    return text, thought, calls, finish, usage


def chats():
    whole = chat(max_tokens=12, seed=1, logprobs=True, top_logprobs=2)
    assert whole.usage.completion_tokens <= 12
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    text, _, _, finish, usage = streamed(max_tokens=12, seed=1)
    assert text == whole.choices[0].message.content, (text, whole)
    assert finish == whole.choices[0].finish_reason
    assert usage.completion_tokens == whole.usage.completion_tokens
    three = chat(max_completion_tokens=5, n=3, seed=4, stop=["zzz"], user="me")
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    one = chat(max_tokens=5, temperature=0, logit_bias={"40": 100}, logprobs=True)
    assert len({entry.token for entry in one.choices[0].logprobs.content}) == 1
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=messages, max_tokens=2
    )
    assert raw.headers["x-pontoon-numeric-class"] == raw.parse().system_fingerprint


def reasoning():
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    more = {"max_tokens": 10, "seed": 1}
    whole = chat(extra_body=thinking, **more).choices[0].message
    assert whole.reasoning == whole.reasoning_content and not whole.content
    text, thought, _, _, usage = streamed(extra_body=thinking, **more)
    assert thought.strip() == whole.reasoning and text == "", (thought, whole)
    assert usage.completion_tokens_details.reasoning_tokens == 10
    off = chat(extra_body={"chat_template_kwargs": {"enable_thinking": False}}, **more)
    assert off.choices[0].message.reasoning is None
    again = messages + [
        {"role": "assistant", "content": "two", "reasoning_content": "one and one"},
        {"role": "user", "content": "Sure?"},
    ]
    client.chat.completions.create(model=model, messages=again, max_tokens=2)


def formats():
    wanted = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    more = {"temperature": 0.5, "seed": 2, "max_tokens": 400, "response_format": wanted}
    text = chat(**more).choices[0].message.content
    assert 0 <= json.loads(text)["answer"] <= 99, text
    assert streamed(**more)[0] == text
    more["response_format"] = {"type": "json_object"}
    more.update(max_tokens=300)
    made = chat(**more).choices[0]
    assert made.finish_reason == "length" or isinstance(json.loads(made.message.content), dict)


def tools():
    more = {"seed": 3, "max_tokens": 400, "tools": [tool], "tool_choice": "required"}
    whole = chat(**more).choices[0]
    assert whole.finish_reason == "tool_calls", whole
    call = whole.message.tool_calls[0]
    assert call.function.name == "add" and 0 <= json.loads(call.function.arguments)["answer"] <= 99
    _, _, calls, finish, _ = streamed(**more)
    assert finish == "tool_calls" and calls[0]["name"] == "add", calls
    assert "".join(calls[0]["pieces"]) == call.function.arguments
    assert len(calls[0]["pieces"]) > 2, "the arguments came at once"
    named = {"type": "function", "function": {"name": "add"}}
    chat(**{**more, "tool_choice": named})
    history = messages + [
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "2"},
    ]
    client.chat.completions.create(model=model, messages=history, tools=[tool], max_tokens=2)
    # The grammar lets the model write two calls, which it would not do by itself.
    written = r'<tool_call>\{"name": "add", "arguments": \{"answer": [0-9]\}\}</tool_call>'
    free = {"tools": [tool], "max_tokens": 400, "seed": 3}
    free["extra_body"] = {"guided_regex": f"({written}){{2}}"}
    assert len(chat(**free).choices[0].message.tool_calls) == 2
    single = chat(parallel_tool_calls=False, **free).choices[0]
    assert len(single.message.tool_calls) == 1 and single.finish_reason == "tool_calls", single
    _, _, calls, finish, _ = streamed(parallel_tool_calls=False, **free)
    assert list(calls) == [0] and finish == "tool_calls", calls


def completions():
    scored = client.completions.create(
        model=model, prompt=[[5, 6, 7]], max_tokens=0, echo=True, logprobs=1
    )
    logprobs = scored.choices[0].logprobs
    assert len(logprobs.token_logprobs) == 3 and logprobs.token_logprobs[0] is None
    assert len(logprobs.top_logprobs[1]) in (1, 2)
    scores = client.completions.create(
        model=model, prompt=[5, 6, 7], max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    first, second, third = scores.choices[0].prompt_logprobs
    assert first is None and second["6"]["logprob"] == logprobs.token_logprobs[1]
    assert third["7"]["rank"] >= 1 and third["7"]["decoded_token"]
    two = client.completions.create(model=model, prompt=["one", "two"], max_tokens=3, n=2, seed=1)
    assert len(two.choices) == 4 and two.usage.completion_tokens <= 12
    pieces = client.completions.create(
        model=model, prompt=["one", "two"], max_tokens=3, n=2, seed=1, stream=True
    )
    texts = [""] * 4
    for piece in pieces:
        for choice in piece.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in two.choices]


def responses():
    more = {"model": model, "max_output_tokens": 8}
    response = client.responses.create(input="One and one?", instructions="Be brief.", **more)
    assert client.responses.retrieve(response.id).output_text == response.output_text
    assert len(client.responses.input_items.list(response.id).data) == 1
    next_one = client.responses.create(input="More", previous_response_id=response.id, **more)
    assert next_one.usage.input_tokens > response.usage.input_tokens
    text, names = "", []
    for event in client.responses.create(input="Two?", stream=True, **more):
        names.append(event.type)
        if event.type == "response.output_text.delta":
            text += event.delta
    assert names[0] == "response.created", names
    assert names[-1] in ("response.completed", "response.incomplete"), names
    wanted = {"format": {"type": "json_schema", "name": "sum", "schema": schema}}
    formatted = {"model": model, "input": "x", "text": wanted, "max_output_tokens": 400}
    with client.responses.stream(**formatted) as stream:
        for _ in stream:
            pass
        assert 0 <= json.loads(stream.get_final_response().output_text)["answer"] <= 99
    own = {"type": "function", "name": "add", "parameters": schema, "strict": True}
    called = client.responses.create(
        model=model, input="Add.", tools=[own], tool_choice="required", max_output_tokens=400
    )
    call = [item for item in called.output if item.type == "function_call"][0]
    assert 0 <= json.loads(call.arguments)["answer"] <= 99
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
    client.responses.create(input=[result], previous_response_id=called.id, **more)
    made = client.responses.create(**formatted)
    assert 0 <= json.loads(made.output_text)["answer"] <= 99
    begun = client.responses.create(model=model, input="Count.", background=True)
    ended = client.responses.cancel(begun.id)
    assert ended.status in ("cancelled", "completed", "incomplete"), ended
    client.responses.delete(begun.id)
    try:
        client.responses.retrieve(begun.id)
        raise SystemExit("a deleted response is still there")
    except openai.NotFoundError:
        pass


def errors():
    cases = [
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"tools": [{}]}, "tools[0].function"),
    ]
    for more, param in cases:
        try:
            chat(**more)
            raise SystemExit(f"{more} was taken")
        except openai.BadRequestError as error:
            assert error.param == param, error
    try:
        client.chat.completions.create(model="other", messages=messages)
        raise SystemExit("a model that does not exist was taken")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found" and error.param == "model"
    try:
        openai.OpenAI(base_url=url, api_key="no", max_retries=0).models.list()
        raise SystemExit("a wrong key was taken")
    except openai.AuthenticationError:
        pass


async def together():
    """Many at once get what each would get alone."""
    many = openai.AsyncOpenAI(base_url=url, api_key="secret", max_retries=0)

    async def one(seed):
        made = await many.chat.completions.create(
            model=model, messages=messages, max_tokens=10, seed=seed
        )
        return made.choices[0].message.content

    seeds = list(range(8)) * 2
    texts = await asyncio.gather(*(one(seed) for seed in seeds))
    assert texts[:8] == texts[8:]
    assert texts[3] == chat(max_tokens=10, seed=3).choices[0].message.content


for part in (chats, reasoning, formats, tools, completions, responses, errors):
    part()
asyncio.run(together())
vectors = client.embeddings.create(model=model, input=["a boat", "a bridge"])
assert len(vectors.data) == 2 and abs(sum(x * x for x in vectors.data[0].embedding) - 1) < 1e-3
print("the openai client is content")
