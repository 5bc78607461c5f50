"""The OpenAI Python client against the quick start: argument 1 is the gateway's host:port."""
import json
import sys

import openai

client = openai.OpenAI(base_url=f"http://{sys.argv[1]}/v1", api_key="none", max_retries=0)
EARTH = [{"role": "user", "content": "地球的周长是多少?"}]

assert [m.id for m in client.models.list()] == ["demo"], client.models.list()

reply = client.chat.completions.create(model="demo", messages=EARTH, temperature=0)
text = reply.choices[0].message.content
assert "40,075" in text or "40075" in text, text
assert reply.choices[0].finish_reason == "stop", reply
assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens, reply.usage
assert reply.usage.completion_tokens > 0

chunks = list(client.chat.completions.create(
    model="demo", messages=EARTH, temperature=0, stream=True, stream_options={"include_usage": True}))
assert len({c.id for c in chunks}) == 1 and len({c.created for c in chunks}) == 1, chunks
assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert streamed == text, (streamed, text)
assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == reply.usage.completion_tokens, chunks[-1]
assert chunks[-1].usage.prompt_tokens_details.cached_tokens >= 0

probed = client.chat.completions.create(
    model="demo", messages=EARTH, temperature=0, logprobs=True, top_logprobs=3, max_completion_tokens=5)
entries = probed.choices[0].logprobs.content
assert len(entries) == 5 and all(len(e.top_logprobs) == 3 and e.logprob <= 0 for e in entries), entries
assert entries[0].top_logprobs[0].token == entries[0].token, entries[0]
assert probed.choices[0].finish_reason == "length"

completion = client.completions.create(model="demo", prompt="地球", max_tokens=4, temperature=0)
assert completion.usage.completion_tokens == 4 and completion.choices[0].finish_reason == "length", completion
parts = list(client.completions.create(model="demo", prompt="地球", max_tokens=4, temperature=0, stream=True))
assert "".join(p.choices[0].text for p in parts if p.choices) == completion.choices[0].text

seeded = [client.chat.completions.create(model="demo", messages=EARTH, temperature=1.5, seed=7, max_tokens=12)
          .choices[0].message.content for _ in range(2)]
assert seeded[0] == seeded[1], seeded

stopped = client.chat.completions.create(model="demo", messages=EARTH, temperature=0, stop=[text[4:6]])
assert stopped.choices[0].message.content == text[:text.index(text[4:6])], stopped

CITY = {"type": "object", "additionalProperties": False, "required": ["name", "large"], "properties": {
    "name": {"type": "string", "maxLength": 12}, "large": {"type": "boolean"}}}
described = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}
for seed in range(4):
    formed = client.chat.completions.create(
        model="demo", messages=EARTH, temperature=1.5, seed=seed, response_format=described)
    city = json.loads(formed.choices[0].message.content)
    assert set(city) == {"name", "large"} and len(city["name"]) <= 12 and isinstance(city["large"], bool), city
    assert formed.choices[0].finish_reason == "stop", formed
pieces = client.chat.completions.create(
    model="demo", messages=EARTH, temperature=1.5, seed=3, response_format=described, stream=True)
assert json.loads("".join(p.choices[0].delta.content or "" for p in pieces)) == city
matched = client.completions.create(model="demo", prompt="地球", extra_body={"regex": "(yes|no), [0-9]{3}"})
assert matched.choices[0].text.split(", ")[0] in ("yes", "no") and matched.choices[0].text[-3:].isdigit(), matched
try:
    client.chat.completions.create(model="demo", messages=EARTH, response_format={
        "type": "json_schema", "json_schema": {"name": "x", "schema": {"items": {"not": {}}}}})
except openai.BadRequestError as error:
    assert "/items/not" in error.body["message"], error.body
else:
    raise AssertionError("a keyword that cannot be enforced was accepted")

several = client.chat.completions.create(model="demo", messages=EARTH, temperature=1.5, seed=7, n=3, max_tokens=12)
assert [c.index for c in several.choices] == [0, 1, 2], several
assert several.choices[0].message.content == seeded[0], several
assert len({c.message.content for c in several.choices}) > 1, several
assert several.usage.prompt_tokens == reply.usage.prompt_tokens, several.usage

echoed = client.completions.create(model="demo", prompt="地球的周长", max_tokens=2, echo=True, logprobs=1)
told = echoed.choices[0].logprobs
assert told.token_logprobs[0] is None and all(p <= 0 for p in told.token_logprobs[1:]), told
assert len(told.tokens) == echoed.usage.prompt_tokens + 2, echoed

for wrong, kind in [
        (dict(model="nothing"), openai.NotFoundError),
        (dict(temperature=-1), openai.BadRequestError),
        (dict(max_tokens=0), openai.BadRequestError),
        (dict(stop=["a"] * 5), openai.BadRequestError),
        (dict(messages=[]), openai.BadRequestError),
        (dict(messages=[{"role": "user", "content": "x" * 200_000}]), openai.BadRequestError)]:
    try:
        client.chat.completions.create(**{"model": "demo", "messages": EARTH, **wrong})
    except kind as error:
        assert error.body["message"] and "type" in error.body, error.body
    else:
        raise AssertionError(f"{wrong} was accepted")
print("ok")
