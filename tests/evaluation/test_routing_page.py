"""The page of a routed text: read back by an HTML parser, its weights against a forward over the whole text."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import molex
from molex.cli import app
from molex.errors import ConfigError, StateError, TargetError
from molex.evaluation.routed_text import RoutedText, token_texts
from molex.evaluation.routing_page import dominant_experts, page, write_page
from molex.mixture import Mixture
from molex.workbench import dataset, load_base, load_tokenizer
from tests.models import SMALL, mixture_of, wake_experts

PROMPT = 'upper: "<script>alert(1)</script> & é€\n= '
VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """What a browser would see: texts by where they stand, attributes of every tag."""

    def __init__(self, document: str):
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: dict[str, list[str]] = {"prompt": [], "generated": []}
        self.classes: list[list[str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append((tag, attributes))
        if tag == "span" and "token" in (attributes.get("class") or "").split():
            self.classes.append((attributes["class"] or "").split())
            self.tokens[self.section()].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, attributes = self.open[-1] if self.open else ("", {})
        if "token" in (attributes.get("class") or "").split():
            self.tokens[self.section()][-1] += data
        key = tag if tag != "script" else f"script {attributes.get('type') or 'code'}"
        self.texts.setdefault(key, []).append(data)

    def section(self) -> str:
        return next(str(a["id"]) for tag, a in reversed(self.open) if tag == "section")

    def routing(self) -> dict[str, Any]:
        return json.loads("".join(self.texts["script application/json"]))

    def weights(self) -> Tensor:
        """(L, N, E) as the page's script reads them."""
        routing = self.routing()
        codes = np.frombuffer(base64.b64decode(routing["weights"]), "<u2").reshape(routing["shape"])
        return torch.tensor(routing["low"] + codes * (routing["high"] - routing["low"]) / 65535)


def workbench_mixture(method: str, **overrides: Any) -> Mixture:
    mixture = molex.convert(load_base(), molex.preset(method, **{**SMALL, **overrides}))
    wake_experts(mixture.model)
    return mixture


def forward_weights(mixture: Mixture, ids: list[int]) -> dict[str, list[list[float]]]:
    """{layer: a list of expert weights for each token}, from one forward over the whole text, entry by entry."""
    with torch.no_grad(), mixture.record() as steps:
        mixture.model.eval()(torch.tensor([ids]))
    found = {}
    for name, decision in steps[0].items():
        num_experts = mixture.layers[name].experts.num_experts
        if num_experts == 1 or mixture.layers[name].plain:
            continue
        num_heads = decision.routing.num_experts // num_experts
        rows = [[0.0] * num_experts for _ in ids]
        for t in range(len(ids)):
            for slot, expert in enumerate(decision.routing.expert_ids[t].tolist()):
                if expert >= 0:
                    rows[t][expert % num_experts] += float(decision.routing.weights[t, slot]) / num_heads
        found[name] = rows
    return found


@pytest.mark.parametrize(
    ("method", "overrides"),
    [("mola", {"allocation": (2, 2, 2, 2, 3, 3, 4, 4)}), ("mixlora", {}), ("xlora", {}), ("mhr", {"num_tasks": 1})],
    ids=["linear", "ffn", "model", "heads"],
)
def test_embedded_weights_are_those_of_one_forward(method: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    mixture = workbench_mixture(method, **overrides)
    with mixture.using(tasks=[0]):
        text = write_page(mixture, load_tokenizer(), PROMPT, tmp_path / "page.html", max_new_tokens=9)
        expected = forward_weights(mixture, text.ids[:-1])
    shown = Page((tmp_path / "page.html").read_text())
    weights_LTE = shown.weights()
    routing = shown.routing()
    assert routing["layers"] == list(expected)
    assert routing["experts"] == mixture.experts
    assert len(text.ids) == text.num_prompt + 9 or text.ids[-1] == load_tokenizer().eos_token_id
    assert weights_LTE.shape == (len(expected), len(text.ids) - 1, len(mixture.experts))
    assert float(weights_LTE.max()) > 0.1
    for layer, rows in zip(weights_LTE, expected.values(), strict=True):
        for token, row in zip(layer.tolist(), rows, strict=True):
            padded = row + [0.0] * (len(token) - len(row))
            assert token == pytest.approx(padded, abs=1e-4)


def test_the_page_shows_the_text_and_nothing_else(tmp_path: Path) -> None:
    mixture, tokenizer = workbench_mixture("mixlora"), load_tokenizer()
    text = write_page(mixture, tokenizer, PROMPT, tmp_path / "page.html", max_new_tokens=9)
    document = (tmp_path / "page.html").read_text()
    shown = Page(document)
    assert not shown.open, "every tag is closed"
    given, made = text.ids[: text.num_prompt], text.ids[text.num_prompt :]
    assert "".join(shown.tokens["prompt"]) == tokenizer.decode(given) == f"<bos>{PROMPT}"
    assert "".join(shown.tokens["prompt"] + shown.tokens["generated"]) == tokenizer.decode(text.ids)
    assert (len(shown.tokens["prompt"]), len(shown.tokens["generated"])) == (len(given), len(made))
    assert [tag for tag, _ in shown.tags].count("script") == 2, "the prompt's script is text"
    for tag, attributes in shown.tags:
        assert tag not in ("link", "img", "iframe")
        assert not {"src", "href", "onclick"} & attributes.keys()
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", document)
    assert [a["tabindex"] for tag, a in shown.tags if "token" in (a.get("class") or "")].count("0") == 1


def test_colours_are_those_of_the_largest_mean_weight(tmp_path: Path) -> None:
    mixture = workbench_mixture("mola")
    text = write_page(mixture, load_tokenizer(), PROMPT, tmp_path / "page.html", max_new_tokens=5)
    shown = Page((tmp_path / "page.html").read_text())
    expected = forward_weights(mixture, text.ids[:-1])
    largest = []
    for t in range(len(text.ids) - 1):
        means = [sum(rows[t][e] for rows in expected.values()) for e in range(3)]
        largest.append(means.index(max(means)))
    assert [classes[-1] for classes in shown.classes] == [*(f"e{expert}" for expert in largest), "unread"]
    assert len(set(largest)) > 1, "one colour shows nothing"
    shares = [f"{round(100 * largest.count(expert) / len(largest))}%" for expert in range(3)]
    assert [item for item in shown.texts["span"] if item.endswith("%")] == shares
    assert shown.texts["option"] == ["mean over layers", *expected]
    assert {"part", "newline"} <= {kind for classes in shown.classes for kind in classes}


def routed(weights: Tensor, names: tuple[str, ...]) -> RoutedText:
    num_layers, num_read, _ = weights.shape
    layers = tuple(f"layer{i}" for i in range(num_layers))
    return RoutedText(list(range(num_read + 1)), [*"abcdefgh"[: num_read + 1]], 2, layers, names, weights)


def test_names_cannot_break_out_of_the_page() -> None:
    names = ("</script><b>x", "<!-- prompt -->", "a & b")
    weights = torch.tensor([[[0.2, 0.3, 0.5], [0.0, 0.0, 0.0], [-0.9, 0.1, 0.0]]])
    shown = Page(page(routed(weights, names)))
    assert tuple(shown.routing()["experts"]) == names
    assert not any(tag == "b" for tag, _ in shown.tags)
    assert shown.weights().flatten().tolist() == pytest.approx(weights.flatten().tolist(), abs=1e-4)
    assert [classes[1:] for classes in shown.classes] == [["e2"], [], ["e0"], ["unread"]]
    assert dominant_experts(weights[0]) == [2, -1, 0]


def test_the_thirteenth_expert_is_striped() -> None:
    weights = torch.eye(30)[None, :7]
    style = "".join(Page(page(routed(weights, tuple(map(str, range(30)))))).texts["style"])
    rules = dict(re.findall(r"\.e(\d+) \{(.*?)\}", style))
    assert len(rules) == 30
    assert len(set(rules.values())) == 30, "no two experts look alike"
    colours = {expert: rule.split(";")[0] for expert, rule in rules.items()}
    assert colours["0"] == colours["12"] == colours["24"]
    assert len(set(colours.values())) == 12
    assert ["gradient" in rules[expert] for expert in ("11", "12", "29")] == [False, True, True]


def test_pieces_of_characters_and_of_words() -> None:
    tokenizer = load_tokenizer()
    ids = tokenizer("é€ a\n", add_special_tokens=False)["input_ids"]
    assert token_texts(tokenizer, ids) == ["", "é", "", "", "€", " ", "a", "\n"]
    assert token_texts(tokenizer, ids[:3]) == ["", "é", "\ufffd"], "a text may end within a character"
    assert token_texts(tokenizer, [0xC3, ord("a"), ord("b")]) == ["", "\ufffda", "b"]


def test_sentencepiece_tokens_keep_their_spaces() -> None:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hel", "lo", "▁world", "."]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    ids = [vocabulary[p] for p in ("▁hel", "lo", "▁world", "<0xE2>", "<0x82>", "<0xAC>", ".", "▁", "▁world")]
    texts = token_texts(tokenizer, ids)
    assert texts == ["hel", "lo", " world", "", "", "€", ".", " ", " world"]
    assert "".join(texts) == tokenizer.decode(ids)


def test_what_has_no_page_is_told(tmp_path: Path) -> None:
    tokenizer, out = load_tokenizer(), tmp_path / "page.html"
    with pytest.raises(ConfigError, match="no layer has more than one expert"):
        write_page(workbench_mixture("lora", num_experts=1), tokenizer, "a", out)
    with pytest.raises(TargetError, match="an encoder-decoder"):
        write_page(mixture_of("t5", targets=("all",)), tokenizer, "a", out)
    with pytest.raises(TargetError, match="does not generate"):
        write_page(mixture_of("bert_classifier", targets=("all",)), tokenizer, "a", out)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        write_page(workbench_mixture("mola"), tokenizer, "a", out, max_new_tokens=0)
    off = workbench_mixture("mola")
    with off.disabled(), pytest.raises(StateError, match="the experts are off"):
        write_page(off, tokenizer, "a", out)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_page_picture_and_table(tmp_path: Path) -> None:
    mixture = workbench_mixture("mola")
    mixture.save(tmp_path / "mixture")
    rows = dataset(["upper", "ends"], "test", 6)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "inspect",
        str(tmp_path / "mixture"),
        "--routing",
        "--prompt",
        "upper: abc\n= ",
        "--max-new-tokens",
        "4",
    ]
    arguments += ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert list(printed["mean_weights"]) == ["upper", "ends"]
    for panel in printed["mean_weights"].values():
        assert len(panel) == 56
        assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in panel.values())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["routing.html", "routing.png"]
    assert (tmp_path / "out" / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert Page((tmp_path / "out" / "routing.html").read_text()).tokens["prompt"][1:4] == ["u", "p", "p"]
    table = CliRunner().invoke(app, arguments).stdout
    assert all(word in table for word in ("upper", "ends", "Written: "))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--routing"], ConfigError, "--prompt"),
        (["--prompt", "a"], ConfigError, "go with --routing"),
        (["--routing", "--prompt", "a", "--data", "nowhere.jsonl"], ConfigError, "cannot be read"),
    ],
)
def test_the_command_refuses(arguments: list[str], error: type[Exception], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), *arguments])
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


def test_a_plain_checkpoint_has_no_routing(tmp_path: Path) -> None:
    load_base().save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--routing", "--prompt", "a"])
    assert isinstance(result.exception, StateError)
