"""Tokens to text: exactly the decoded text however it is cut, and nothing of a stop string."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from molex.workbench import load_tokenizer
from molex.workbench.tokenizer import BOS, EOS
from molex_serve.engine.base import Event, TokenLogprob
from molex_serve.http.text import ChoiceText, Piece, StopFinder, echo, joined
from molex_serve.http.vocabulary import Vocabulary

TEXTS = ("plain", "Grüße aus Köln", "日本語", "🙂👩‍👩‍👧 ok", "\ufffd real", "a\x00b")


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(load_tokenizer())


def pieces(vocabulary: Vocabulary, ids: list[int], cuts: list[int], stops: tuple[str, ...] = ()) -> list[Piece]:
    """ids in events of these sizes, up to a piece that is the last."""
    choice, taken, start = ChoiceText(vocabulary, stops), [], 0
    for size in [*cuts, len(ids)]:
        part = tuple(ids[start : start + size])
        start += len(part)
        taken.append(choice.take(Event(part, finish_reason="length" if start == len(ids) else None)))
        if taken[-1].finish_reason:
            return taken
    raise AssertionError


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_pieces_are_whole_characters_and_together_the_text(vocabulary: Vocabulary, text: str, size: int) -> None:
    ids = list(text.encode())
    taken = pieces(vocabulary, ids, [size] * (len(ids) // size))
    assert joined(taken).text == text
    assert "\ufffd" in text or all("\ufffd" not in piece.text for piece in taken)


def test_any_bytes_give_what_the_tokenizer_gives(vocabulary: Vocabulary) -> None:
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.choice((0x41, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0xFF, EOS)) for _ in range(12)]
        taken = pieces(vocabulary, ids, [rng.randint(1, 3) for _ in range(12)])
        text = vocabulary.tokenizer.decode(ids, skip_special_tokens=True)
        assert joined(taken).text == text
        whole = joined(taken)
        assert "".join(token.text for token in whole.tokens) + whole.rest == text


def test_offsets_count_the_characters_before_a_token(vocabulary: Vocabulary) -> None:
    tokens = joined(pieces(vocabulary, list("aéb".encode()), [1, 1, 1])).tokens
    assert [token.offset for token in tokens] == [0, 1, 1, 2]


def naive(text: str, stops: tuple[str, ...]) -> str:
    """The shortest beginning of the text that ends in a stop string, without it; byte by byte, as tokens come."""
    for end in range(len(text) + 1):
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            return text[: min(found)]
    return text


def test_stop_strings_across_tokens_against_a_naive_search(vocabulary: Vocabulary) -> None:
    rng = random.Random(2)
    for _ in range(500):
        text = "".join(rng.choice("abc") for _ in range(rng.randint(1, 14)))
        count = rng.randint(1, 3)
        stops = tuple("".join(rng.choice("abc") for _ in range(rng.randint(1, 4))) for _ in range(count))
        taken = pieces(vocabulary, list(text.encode()), [rng.randint(1, 4) for _ in text], stops)
        whole = joined(taken)
        assert whole.text == naive(text, stops)
        assert whole.finish_reason == ("stop" if whole.text != text else "length")


def test_nothing_of_a_stop_string_is_shown_before_it_is_known_to_be_none() -> None:
    finder = StopFinder(("END", "\n\n"))
    assert finder.feed("go E") == ("go ", False)
    assert finder.feed("N") == ("", False)
    assert finder.feed("\n") == ("EN", False)
    assert finder.feed("x") == ("\nx", False)
    assert finder.feed("END and more") == ("", True)


def test_a_stop_string_ends_a_piece_at_its_token(vocabulary: Vocabulary) -> None:
    (piece,) = pieces(vocabulary, list(b"one.two"), [7], (".",))
    assert (piece.text, piece.finish_reason, len(piece.tokens)) == ("one", "stop", 4)


def test_stop_tokens_are_silent(vocabulary: Vocabulary) -> None:
    choice = ChoiceText(vocabulary, silent=frozenset(b"!"))
    assert choice.take(Event(tuple(b"ok!"), finish_reason="stop")).text == "ok"


def test_a_special_token_is_named_and_not_shown(vocabulary: Vocabulary) -> None:
    assert vocabulary.text(EOS) == b""
    assert vocabulary.label(EOS) == "<eos>"
    assert vocabulary.label(0xE2) == "bytes:\\xe2"
    assert vocabulary.label(0xE9) == "bytes:\\xe9"
    assert vocabulary.spelling(10**6) == b""


def test_an_added_token_is_written_as_it_is() -> None:
    tokenizer = load_tokenizer()
    tokenizer.add_tokens(["<think>", "日本"])
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer.encode("a<think>日本é", add_special_tokens=False)
    assert ids[1:3] == [264, 265]
    assert joined(pieces(vocabulary, ids, [1] * len(ids))).text == tokenizer.decode(ids) == "a<think>日本é"


def test_an_echo_is_the_prompt_as_it_was_given(vocabulary: Vocabulary) -> None:
    scores = [TokenLogprob(ord("a"), -1.0), TokenLogprob(ord("b"), -2.0)]
    piece = echo(vocabulary, (BOS, ord("a"), ord("b")), "ab", scores)
    assert piece.text == "ab"
    assert [token.logprob and token.logprob.logprob for token in piece.tokens] == [None, -1.0, -2.0]
    assert [token.offset for token in piece.tokens] == [0, 0, 1]


def fast(vocab: list[str], decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=[], unk_token="<unk>"))
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", clean_up_tokenization_spaces=False)


def test_byte_fallback_keeps_spaces_and_joins_bytes() -> None:
    words = ["<unk>", "▁the", "▁", "end", "<0xE2>", "<0x82>", "<0xAC>"]
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    vocabulary = Vocabulary(fast(words, decoder))
    assert joined(pieces(vocabulary, [1, 2, 4, 5, 6, 1, 3], [1] * 7)).text == " the € theend"
    assert vocabulary.label(4) == "bytes:\\xe2"


def test_a_decoder_of_another_kind_is_asked_behind_an_anchor() -> None:
    vocabulary = Vocabulary(fast(["<unk>", "a", "go", "##ing", "b"], decoders.WordPiece(prefix="##", cleanup=False)))
    assert joined(pieces(vocabulary, [2, 3, 4], [1, 1, 1])).text == " going b"
