"""JSON by schema: what comes out parses and conforms, and a schema that cannot be followed is refused."""

import json
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from molex.workbench.tokenizer import EOS, VOCABULARY_SIZE
from molex_serve.engine.base import Request, Sampling
from molex_serve.engine.grammar import Grammars
from molex_serve.errors import BadRequest
from tests.models import tiny
from tests.serve.engine.serving import CHUNKED, CRAMPED, Adapted, greedy, running, serve, submit, tokenizer

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "ok": {"type": "boolean"},
            "kind": {"enum": ["law", "code", "größe"]},
            "parts": {"type": "array", "items": {"enum": [1, 22]}, "minItems": 1, "maxItems": 2},
        },
        "required": ["ok", "kind", "parts"],
        "additionalProperties": False,
    }
)


def conforms(tokens: list[int]) -> bool:
    assert tokens[-1] == EOS
    found = json.loads(tokenizer().decode(tokens[:-1]))
    assert set(found) == {"ok", "kind", "parts"}
    return found["kind"] in ("law", "code", "größe") and set(found["parts"]) <= {1, 22}


def asking(name: str, seed: int, temperature: float) -> Request:
    sampling = Sampling(max_tokens=60, temperature=temperature, seed=seed, json_schema=SCHEMA, ignore_eos=True)
    return Request(id=name, prompt_ids=tuple(b"Answer: "), sampling=sampling, handle=seed % 9, generation=str(seed % 9))


@pytest.mark.parametrize("settings", [CHUNKED, replace(CRAMPED, cache_tokens=112)], ids=["chunked", "cramped"])
def test_answers_conform(settings: object) -> None:
    """Beside requests that are free, and also where some have to start anew."""
    adapted = Adapted(model=tiny("llama", vocab_size=VOCABULARY_SIZE, max_position_embeddings=128, eos_token_id=EOS))
    requests = [asking(str(i), seed=i, temperature=i % 3) for i in range(6)]
    with running(adapted.engine(settings)) as engine:
        listeners = submit(engine, [*requests, greedy("free", 9, 1, new=20)])
        answers = [listener.wait().tokens for listener in listeners[:6]]
        assert listeners[6].wait().tokens == adapted.generate(greedy("free", 9, 1, new=20))
        assert all(listener.reason == "stop" for listener in listeners[:6])
        assert [serve(engine, [request])[0] for request in requests[1:3]] == answers[1:3]
    assert all(conforms(answer) for answer in answers)


REFUSED = {
    "an unheard-of type": '{"type": "unheard-of"}',
    "half a document": "{",
    "a list": "[]",
    "a page elsewhere": '{"$ref": "http://a/b"}',
    "what it cannot": '{"not": {"type": "string"}}',
    "itself alone": '{"$ref": "#"}',
    "a long one": json.dumps({"enum": ["x" * 99] * 2000}),
}


@pytest.mark.parametrize("schema", REFUSED.values(), ids=REFUSED)
def test_schemas_that_cannot_be_followed_are_refused(schema: str) -> None:
    with pytest.raises(BadRequest, match="json_schema"):
        Grammars(tokenizer(), [EOS], VOCABULARY_SIZE).matcher(schema)


def test_tokenizer_larger_than_the_model_is_refused() -> None:
    with pytest.raises(BadRequest, match="this tokenizer"):
        Grammars(tokenizer(), [EOS], 64).matcher(SCHEMA)


def test_masks_of_another_tokenizer_and_a_padded_vocabulary() -> None:
    """Tokens of several characters; ids that only the model has are never allowed."""
    words = ["<end>", "{", '"', "a", ":", "t", "r", "u", "e", "}", '{"', '":', "tr", "▁"]
    merges = [("{", '"'), ('"', ":"), ("t", "r")]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    schema = '{"type":"object","properties":{"a":{"const":true}},"required":["a"],"additionalProperties":false}'
    matcher = Grammars(fast, [0], 16).matcher(schema)
    left, written = '{"a":true}', []
    while left:
        allowed = matcher.allowed(written, 16).nonzero().flatten().tolist()
        assert allowed
        assert all(token < len(words) and left.startswith(words[token]) for token in allowed)
        written.append(max(allowed, key=lambda token: len(words[token])))
        left = left.removeprefix(words[written[-1]])
    assert [words[token] for token in written] == ['{"', "a", '":', "tr", "u", "e", "}"]
    assert matcher.allowed(written, 16).nonzero().flatten().tolist() == [0]
    assert not matcher.error


def test_tokenizer_whose_tokens_are_no_bytes_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<end>": 0, "a": 1}, unk_token="a"))
    with pytest.raises(BadRequest, match="this tokenizer"):
        Grammars(PreTrainedTokenizerFast(tokenizer_object=backend), [0], 2).matcher("{}")


def test_a_matcher_follows_tokens_that_are_taken_back() -> None:
    grammars = Grammars(tokenizer(), [EOS], VOCABULARY_SIZE)
    text = b'{"ok":true,"kind":"law","parts":[1]}'
    matcher, fresh = grammars.matcher(SCHEMA), grammars.matcher(SCHEMA)
    for answer in (text[:9], text[:4], b'{"ok":false', text, text[:12], [*text, EOS], text[:3]):
        assert matcher.allowed(answer, VOCABULARY_SIZE).tolist() == (
            grammars.matcher(SCHEMA).allowed(answer, VOCABULARY_SIZE).tolist()
        )
    assert fresh.allowed([ord("x")], VOCABULARY_SIZE).all()
    assert fresh.error
    assert not matcher.error


def test_grammar_that_gives_up_ends_its_request_alone() -> None:
    adapted = Adapted(model=tiny("llama", vocab_size=VOCABULARY_SIZE, max_position_embeddings=128, eos_token_id=EOS))
    with running(adapted.engine(CHUNKED)) as engine:
        with engine.paused():
            broken, fine = submit(engine, [asking("broken", 1, 0), greedy("fine", 9, 1)])
            live = engine.roster.find("0")
            live.matcher.allowed([ord("x")], VOCABULARY_SIZE)
        assert broken.wait().reason == "error"
        assert "grammar" in str(broken.events[-1].error)
        assert fine.wait().tokens == adapted.generate(greedy("fine", 9, 1))
        serve(engine, [greedy("next", 9, 1)])
        assert engine.stats().cache_free == engine.stats().cache_total
