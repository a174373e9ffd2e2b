"""/v1/completions with OpenAI's own client, and with raw bodies where that cannot say it."""

import json
from typing import Any

import pytest
from openai import APIError, BadRequestError, NotFoundError, RateLimitError

from molex.workbench.tokenizer import BOS, EOS
from tests.serve.http.conftest import Running, wait_for


def test_a_completion_says_who_spoke_and_what_it_cost(served: Running) -> None:
    answer = served.client.completions.create(model="base", prompt="hello", max_tokens=100)
    assert answer.object == "text_completion"
    assert answer.model == "base"
    assert answer.choices[0].text == "[base]hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 12)  # with <bos>, with <eos>
    assert answer.model_extra == {"adapter_generation": None}


@pytest.mark.parametrize(
    "names", [{"model": "law"}, {"model": "base:law"}, {"model": "base", "adapter": "law"}, {"adapter": "law"}]
)
def test_an_adapter_is_named_in_three_ways(served: Running, names: dict[str, str]) -> None:
    answer = served.http.post("/v1/completions", json={"prompt": "x", **names}).json()
    assert answer["choices"][0]["text"] == "[aaaaaaaaaaaa]x"
    assert answer["adapter_generation"] == "aaaaaaaaaaaa"
    assert answer["model"] == names.get("model", "law")
    assert served.engine.submitted[-1].handle == 1


def test_an_unknown_adapter_is_never_the_base(served: Running) -> None:
    for name in ("nobody", "base:nobody", "base:base", "Base", ""):
        with pytest.raises(NotFoundError) as caught:
            served.client.completions.create(model=name, prompt="x")
        assert caught.value.code == "unknown_adapter"
    assert served.completion(adapter="nobody").status_code == 404
    assert served.http.post("/v1/completions", json={"prompt": "x"}).json()["error"]["param"] == "model"
    assert served.completion(model="law", adapter="code").status_code == 400
    assert not served.engine.submitted


@pytest.mark.parametrize("per_event", [1, 3, 50])
@pytest.mark.parametrize("text", ["hello", "Grüße 🙂", "日本語\n\n"])
def test_a_stream_says_the_same_as_an_answer(served: Running, per_event: int, text: str) -> None:
    served.engine.per_event = per_event
    asked: dict[str, Any] = {"model": "base", "prompt": text, "max_tokens": 60, "logprobs": 2, "n": 2, "seed": 5}
    asked["stop"] = ["\n\n"]
    whole = served.client.completions.create(**asked)
    texts, logprobs, finish = {0: "", 1: ""}, {0: [], 1: []}, {}
    for chunk in served.client.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        logprobs[choice.index] += zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
        if choice.finish_reason:
            assert choice.index not in finish
            finish[choice.index] = choice.finish_reason
        assert chunk.usage is None
        assert "\ufffd" not in choice.text
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert logprobs[choice.index] == list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))
        assert finish[choice.index] == choice.finish_reason


def test_usage_comes_last_where_it_is_asked_for(served: Running) -> None:
    stream = served.client.completions.create(
        model="base", prompt="hello", stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 18
    raw = served.completion(stream=True).text
    assert '"usage"' not in raw
    assert raw.endswith("data: [DONE]\n\n")


def test_a_stop_string_ends_the_text_and_the_request(served: Running) -> None:
    served.engine.say = lambda request: b"one two STOP three four five six seven eight"
    served.engine.steps_left = 12  # as many tokens as it takes
    answer = served.completion(stop="STOP", max_tokens=100).json()
    assert answer["choices"][0] == {"index": 0, "text": "one two ", "logprobs": None, "finish_reason": "stop"}
    assert answer["usage"]["completion_tokens"] == 12
    assert len(served.engine.cancelled) == 1


def test_choices_are_different_and_repeatable(served: Running) -> None:
    answers = [served.client.completions.create(model="base", prompt="x", n=3, seed=7) for _ in range(2)]
    for answer in answers:
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.text for choice in answer.choices] == ["[base]x#7", "[base]x#8", "[base]x#9"]
    assert served.completion(n=2, seed=-(2**63)).status_code == 200
    assert served.completion(n=2, seed=2**63 - 1).status_code == 200
    assert all(0 <= (request.sampling.seed or 0) < 2**63 for request in served.engine.submitted)
    assert served.completion(seed=2**63).status_code == 400


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([104, 105], ["hi"]),
        ([[104], [105, 106]], ["h", "ij"]),
    ],
)
def test_prompts_are_texts_or_tokens_or_lists_of_them(served: Running, prompt: object, texts: list[str]) -> None:
    answer = served.completion(prompt=prompt, n=2).json()
    assert [choice["text"] for choice in answer["choices"]] == [f"[base]{text}" for text in texts for _ in range(2)]
    plain = isinstance(prompt, str) or (isinstance(prompt, list) and isinstance(prompt[0], str))
    assert all((request.prompt_ids[0] == BOS) == plain for request in served.engine.submitted)


@pytest.mark.parametrize(
    "prompt", [None, [], [[]], [""] * 200, {"a": 1}, 5, [1, "a"], [1, True], [1.5], [-1], [264], [10**30], [[1], 2]]
)
def test_other_prompts_are_refused(served: Running, prompt: object) -> None:
    answer = served.completion(prompt=prompt)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


def test_sampling_reaches_the_engine(served: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}}
    served.completion(
        temperature=0,
        top_p=0.5,
        top_k=4,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        stop_token_ids=[7],
        ignore_eos=True,
        logit_bias={"65": -100},
        logprobs=3,
        task=2,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        user="somebody",
        unknown={"x": 1},
    )
    (request,) = served.engine.submitted
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 4, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.logit_bias) == ((7,), True, {65: -100})
    assert (sampling.logprobs, request.task, sampling.max_tokens) == (3, 2, 256)
    assert json.loads(sampling.json_schema or "") == schema


def test_null_is_as_good_as_absent(served: Running) -> None:
    answer = served.completion(temperature=None, n=None, stop=None, seed=None, logit_bias=None, stream=None, echo=None)
    assert answer.status_code == 200
    assert served.engine.submitted[0].sampling.temperature == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "1"),
        ("temperature", -1),
        ("temperature", float("1e400")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("n", 1.0),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("logprobs", 21),
        ("logprobs", True),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("stream", "yes"),
        ("seed", 1.5),
        ("task", -1),
        ("stop_token_ids", [264]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"²": 1}),
        ("logit_bias", {"264": 1}),
        ("logit_bias", {"1": 101}),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("suffix", "end"),
        ("best_of", 3),
        ("model", 5),
        ("adapter", ["law"]),
    ],
)
def test_wrong_values_are_errors_that_name_the_field(served: Running, field: str, value: object) -> None:
    body = json.dumps({"model": "base", "prompt": "x", field: value}).replace("Infinity", "1e400")
    answer = served.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert field in error["message"] or error["param"] == field
    assert not served.engine.submitted


def test_what_does_not_fit_is_refused_and_what_is_not_asked_for_is_cut(served: Running) -> None:
    served.engine.longest = 20
    with pytest.raises(BadRequestError) as caught:
        served.client.completions.create(model="base", prompt="x" * 10, max_tokens=10)
    assert caught.value.code == "context_length_exceeded"
    assert served.completion(prompt="x" * 20).status_code == 400
    assert served.completion(prompt="x" * 10, max_tokens=9).json()["usage"]["total_tokens"] == 20
    assert served.completion(prompt="x" * 10).json()["choices"][0]["finish_reason"] == "length"


def test_logprobs_have_openais_shape(served: Running) -> None:
    served.engine.say = lambda request: "é!".encode()
    answer = served.client.completions.create(model="base", prompt="x", logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa9", "!", "<eos>"]
    assert logprobs.text_offset == [0, 0, 1, 2]
    assert logprobs.token_logprobs == pytest.approx([-0.695, -0.669, -0.533, -0.758])
    assert logprobs.top_logprobs is not None
    assert [len(top) for top in logprobs.top_logprobs] == [2, 2, 2, 3]  # the fake's <eos> is not among its best
    chosen = served.client.completions.create(model="base", prompt="x", logprobs=0).choices[0].logprobs
    assert chosen is not None
    assert chosen.top_logprobs is not None
    assert chosen.top_logprobs[2] == {"!": pytest.approx(-0.533)}


def test_echo_scores_a_prompt_as_harnesses_ask(served: Running) -> None:
    """lm-eval sends tokens, max_tokens 1, logprobs 1, and leaves out the context and the last token."""
    answer = served.completion(prompt=[[BOS, 97, 98, 99], [BOS, 65]], max_tokens=1, logprobs=1, echo=True).json()
    first, second = answer["choices"]
    assert first["text"] == "abc["
    logprobs = first["logprobs"]
    assert logprobs["tokens"] == ["<bos>", "a", "b", "c", "["]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][2:-1] == pytest.approx([-0.598, -0.599])
    assert all(max(top.values()) == -0.5 for top in logprobs["top_logprobs"][1:])
    assert logprobs["text_offset"] == [0, 0, 1, 2, 3]
    assert second["logprobs"]["tokens"] == ["<bos>", "A", "["]


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_0_scores_alone(served: Running, stream: bool) -> None:
    asked = {"prompt": "ab", "max_tokens": 0, "logprobs": 1, "echo": True, "model": "law"}
    if stream:
        events = served.completion(stream=True, **asked).text.split("\n\n")
        (choice,) = json.loads(events[0].removeprefix("data: "))["choices"]
    else:
        (choice,) = served.completion(**asked).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, pytest.approx(-0.597), pytest.approx(-0.598)]
    assert not served.engine.submitted


def test_echo_without_logprobs_is_the_prompt_before_the_answer(served: Running) -> None:
    text = "".join(
        chunk.choices[0].text
        for chunk in served.client.completions.create(model="base", prompt="é", echo=True, stream=True)
    )
    assert text == served.completion(prompt="é", echo=True).json()["choices"][0]["text"] == "é[base]é"


def test_experts_come_with_their_tokens(served: Running) -> None:
    served.engine.say = lambda request: "é\xff.".encode("latin-1") + "é".encode()
    answer = served.completion(model="law", return_experts=True).json()["choices"][0]
    assert "".join(expert["text"] for expert in answer["experts"]) == answer["text"]
    assert answer["experts"][0] == {"text": "", "name": "law", "share": 0.75}
    base = served.completion(return_experts=True).json()["choices"][0]
    assert {(expert["name"], expert["share"]) for expert in base["experts"]} == {(None, None)}
    assert "experts" not in served.completion(model="law").json()["choices"][0]
    chunks = served.completion(model="law", return_experts=True, stream=True).text.split("\n\n")
    assert json.loads(chunks[0].removeprefix("data: "))["choices"][0]["experts"][0]["name"] == "law"


def test_a_full_queue_is_429_and_what_was_begun_is_ended(served: Running) -> None:
    served.engine.queue, served.engine.steps_left = 2, 0
    with pytest.raises(RateLimitError) as caught:
        served.client.completions.create(model="law", prompt="x", n=3)
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.code == "overloaded"
    assert len(served.engine.cancelled) == 2
    served.adapters.busy = True
    assert served.completion(model="law").json()["error"]["code"] == "load_busy"


def test_an_engine_that_fails_is_an_error_in_both_forms(served: Running) -> None:
    served.engine.fail_after = 3
    answer = served.completion()
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "a step failed",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    stream = served.client.completions.create(model="law", prompt="x", stream=True)
    assert "".join(next(stream).choices[0].text for _ in range(3)) == "[aa"
    with pytest.raises(APIError, match="a step failed"):
        next(stream)


def test_an_engine_with_a_fault_takes_no_lease_with_it(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, calls = served.engine.submit, []

    def broken(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise ZeroDivisionError
        submit(*given)

    served.engine.steps_left = 0
    monkeypatch.setattr(served.engine, "submit", broken)
    assert served.completion(model="law", n=3).status_code == 500
    wait_for(lambda: served.adapters.released == ["law"])
    assert len(served.engine.cancelled) == 1


def test_eos_is_the_only_end_of_an_endless_answer(served: Running) -> None:
    served.engine.say = lambda request: bytes([EOS % 256]) * 100
    choice = served.completion(max_tokens=7).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("\x02" * 7, "length")
