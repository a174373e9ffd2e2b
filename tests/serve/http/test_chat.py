"""/v1/chat/completions with OpenAI's own client."""

import json
from typing import Any

import pytest
from openai import BadRequestError

from molex.workbench import load_tokenizer
from molex_serve.http.prompts import of_messages
from molex_serve.http.schemas import Message
from molex_serve.http.vocabulary import Vocabulary
from tests.serve.http.conftest import Running

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def test_messages_go_through_the_models_template(served: Running) -> None:
    answer = served.client.chat.completions.create(
        model="law",
        messages=[
            {"role": "system", "content": "be brief. "},
            {"role": "user", "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]},
        ],
    )
    choice = answer.choices[0]
    assert answer.object == "chat.completion"
    assert choice.message.role == "assistant"
    assert choice.message.content == "[aaaaaaaaaaaa]be brief. hello\n= "
    assert choice.finish_reason == "stop"
    assert answer.model_extra == {"adapter_generation": "aaaaaaaaaaaa"}
    ids = served.engine.submitted[0].prompt_ids
    assert ids == tuple(load_tokenizer()("be brief. hello\n= ").input_ids)


@pytest.mark.parametrize("per_event", [1, 4])
def test_a_stream_says_the_same_as_an_answer(served: Running, per_event: int) -> None:
    served.engine.per_event = per_event
    served.engine.say = lambda request: "Grüße 🙂 und mehr <end> nicht".encode()
    asked: dict[str, Any] = {"model": "base", "messages": HELLO, "n": 2, "stop": ["<end>"]}
    asked |= {"logprobs": True, "top_logprobs": 2}
    whole = served.client.chat.completions.create(**asked)
    texts, roles, tokens = {0: "", 1: ""}, {0: [], 1: []}, {0: [], 1: []}
    for chunk in served.client.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index].append(choice.delta.role)
        tokens[choice.index] += [] if choice.logprobs is None else choice.logprobs.content
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content == "Grüße 🙂 und mehr "
        assert roles[choice.index][0] == "assistant"
        assert set(roles[choice.index][1:]) == {None}
        assert choice.logprobs is not None
        assert tokens[choice.index] == choice.logprobs.content


def test_logprobs_have_openais_shape(served: Running) -> None:
    served.engine.say = lambda request: "é".encode()
    answer = served.client.chat.completions.create(model="base", messages=HELLO, logprobs=True, top_logprobs=2)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert bytes(byte for token in content[:2] for byte in token.bytes or []).decode() == "é"
    assert content[0].logprob == pytest.approx(-0.695)
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5]
    alone = served.client.chat.completions.create(model="base", messages=HELLO, logprobs=True).choices[0].logprobs
    assert alone is not None
    assert alone.content is not None
    assert alone.content[0].top_logprobs == []
    assert served.client.chat.completions.create(model="base", messages=HELLO).choices[0].logprobs is None


def test_usage_comes_last_where_it_is_asked_for(served: Running) -> None:
    stream = served.client.chat.completions.create(
        model="base", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens == 9
    assert last.usage.completion_tokens == len(b"[base]hello\n= ") + 1
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}}, {"type": "array"}),
    ],
)
def test_response_formats_are_schemas(served: Running, given: Any, schema: object) -> None:
    served.client.chat.completions.create(model="base", messages=HELLO, response_format=given)
    found = served.engine.submitted[0].sampling.json_schema
    assert (None if found is None else json.loads(found)) == schema


def test_the_new_name_of_max_tokens_wins(served: Running) -> None:
    served.client.chat.completions.create(model="base", messages=HELLO, max_completion_tokens=3, max_tokens=9)
    answer = served.client.chat.completions.create(model="base", messages=HELLO, max_tokens=4)
    assert [request.sampling.max_tokens for request in served.engine.submitted] == [3, 4]
    assert answer.choices[0].message.content == "[bas"
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("tool_choice", "required"),
        ("messages", []),
        ("messages", "hello"),
        ("messages", [{"role": "wizard", "content": "x"}]),
        ("messages", [{"content": "x"}]),
        ("messages", [{"role": "user", "content": 5}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "assistant", "content": None, "tool_calls": [{}]}]),
        ("top_logprobs", 2),
        ("logprobs", 3),
        ("max_completion_tokens", 0),
    ],
)
def test_what_is_not_served_is_refused_by_name(served: Running, field: str, value: object) -> None:
    answer = served.chat(**{field: value})
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert field in message or "tools" in message or "max_tokens" in message


def test_empty_tools_and_an_assistant_without_text_are_fine(served: Running) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, HELLO[0]]
    assert served.chat(tools=[], tool_choice="none", messages=messages).status_code == 200


def test_a_template_that_refuses_is_the_clients_error(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = served.server.face.vocabulary.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must take turns') }}")
    with pytest.raises(BadRequestError, match="roles must take turns"):
        served.client.chat.completions.create(model="base", messages=HELLO)


def test_a_model_without_a_template_gets_a_plain_one() -> None:
    tokenizer = load_tokenizer()
    tokenizer.chat_template = None
    messages = [Message(role="system", content="be brief"), Message(role="user", content="hi")]
    prompt = of_messages(Vocabulary(tokenizer), messages)
    assert prompt.text == "<bos>system: be brief\nuser: hi\nassistant:"
    assert tokenizer.decode(prompt.ids) == prompt.text


def test_experts_come_with_their_tokens(served: Running) -> None:
    answer = served.chat(model="law", return_experts=True).json()["choices"][0]
    assert "".join(expert["text"] for expert in answer["experts"]) == answer["message"]["content"]
