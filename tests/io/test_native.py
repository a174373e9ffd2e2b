"""Native exports, loaded by plain transformers, say what the mixture says; files, shards and forecasts are true."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from typer.testing import CliRunner

import molex
from molex.cli import app
from molex.errors import CheckpointError, ConfigError
from molex.io.native import TARGETS, export_native, families
from molex.io.native.family import COPIED
from molex.io.native.mixtral import Mixtral
from molex.io.stream import DTYPES, Entry
from tests.io.mixtures import file_bytes, same, snapshot
from tests.io.native import LAYER_1, LLAMA3, loaded, mixture_on, said
from tests.models import tiny

MULTIPLIERS = {
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.7,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
}


class Row(NamedTuple):
    """fields: of the base's config. overrides: of the preset. family: what is chosen, `named` if asked for."""

    base: str
    target: str
    family: str
    fields: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    overrides: dict[str, Any] = {}  # noqa: RUF012
    named: bool = False


ROWS = [
    Row("llama", "transformers", "mixtral"),
    Row("llama", "vllm", "mixtral", {"tie_word_embeddings": True, "head_dim": 16}, {"num_experts": 3}),
    Row("llama", "llama.cpp", "mixtral", {"rope_parameters": LLAMA3}, {"targets": LAYER_1}),
    Row("llama", "transformers", "granitemoe", {"attention_bias": True}),
    Row("llama", "llama.cpp", "granitemoe", {"attention_bias": True}, {"num_experts": 3}),
    Row("mistral", "transformers", "mixtral", {}, {"router": "soft", "num_experts": 3}),
    Row("mistral", "vllm", "mixtral", {}, {"experts": "dora"}),
    Row("mistral", "llama.cpp", "mixtral", {"sliding_window": None}, {"temperature": 3.0}),
    Row("qwen3", "transformers", "qwen3_moe", {"attention_bias": True}),
    Row("qwen3", "vllm", "qwen3_moe", {"tie_word_embeddings": True}, {"targets": LAYER_1}),
    Row("qwen3", "llama.cpp", "qwen3_moe", {}, {"targets": LAYER_1, "num_experts": 3}),
    Row(
        "qwen2", "transformers", "qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    Row("qwen2", "vllm", "qwen2_moe", {"tie_word_embeddings": True}, {"targets": LAYER_1, "num_experts": 3}),
    Row("qwen2", "llama.cpp", "granitemoe"),
    Row("qwen2", "transformers", "granitemoe", {"tie_word_embeddings": True}, {"targets": LAYER_1}, named=True),
    Row("granite", "transformers", "granitemoe", MULTIPLIERS),
    Row("granite", "vllm", "granitemoe", MULTIPLIERS, {"num_experts": 3}),
    Row("granite", "llama.cpp", "granitemoe", {**MULTIPLIERS, "attention_bias": True}),
    Row("olmo2", "transformers", "flex_olmo", {"attention_bias": True}, {"targets": LAYER_1}),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.base}-{row.target}-{row.family}")
def test_the_exported_model_is_the_mixture(row: Row, tmp_path: Path) -> None:
    mixture = mixture_on(row.base, row.fields, **row.overrides)
    family = row.family if row.named else None
    report = export_native(mixture, tmp_path, row.target, family=family, check=False)
    model, logits = loaded(tmp_path)
    expected = said(mixture)
    base = mixture.model.config
    assert report.family == model.config.model_type == row.family
    tied = row.fields.get("tie_word_embeddings", False)
    assert model.config.tie_word_embeddings == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    assert all(getattr(model.config, name) == getattr(base, name) for name in COPIED)  # some do nothing on short texts
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
    with mixture.disabled():
        assert (said(mixture) - expected).abs().max() > 0.05


def test_every_served_pair_has_a_row() -> None:
    served = {(base, target, name) for name in families for base, to in families[name].serves.items() for target in to}
    unasked = {("llama", "transformers", "granitemoe"), ("qwen2", "transformers", "granitemoe")}
    assert served == {(row.base, row.target, row.family) for row in ROWS} | (served & unasked)


@pytest.mark.parametrize(
    ("overrides", "num_experts", "top_k"),
    [
        ({"allocation": (2, 4, 3), "top_k": 1}, 4, 1),
        ({"allocation": (1, 4, 3), "top_k": 1}, 4, 1),
        ({"allocation": (2, 4, 1), "router": "soft"}, 4, 4),
        ({"renormalise": False, "top_k": 4}, 4, 4),
    ],
)
def test_copies_fill_layers_up_where_that_is_exact(
    overrides: dict[str, Any], num_experts: int, top_k: int, tmp_path: Path
) -> None:
    for base in ("llama", "qwen3"):
        mixture = mixture_on(base, **overrides)
        report = export_native(mixture, tmp_path / base, check=False)
        assert (report.num_experts, report.top_k) == (num_experts, top_k)
        torch.testing.assert_close(loaded(tmp_path / base)[1], said(mixture), rtol=1e-5, atol=2e-5)


def test_modules_trained_whole_are_written_as_trained(tmp_path: Path) -> None:
    mixture = mixture_on("llama", also_train=("lm_head", "model.norm"))
    export_native(mixture, tmp_path, check=False)
    _, logits = loaded(tmp_path)
    torch.testing.assert_close(logits, said(mixture), rtol=1e-5, atol=2e-5)


def test_a_head_untied_in_memory_is_written_and_said(tmp_path: Path) -> None:
    mixture = mixture_on("llama", {"tie_word_embeddings": True})
    head = mixture.model.lm_head  # type: ignore[union-attr]
    head.weight = torch.nn.Parameter(head.weight.detach() + 0.1)  # type: ignore[union-attr]
    export_native(mixture, tmp_path, check=False)
    model, logits = loaded(tmp_path)
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(logits, said(mixture), rtol=1e-5, atol=2e-5)


def test_sixteen_bit_weights_are_rounded_once(tmp_path: Path) -> None:
    model = tiny("llama").to(torch.bfloat16)
    mixture = molex.convert(model, molex.preset("mixlora", num_experts=3, rank=4))
    up = mixture.layers["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        for layer in mixture.layers.values():
            layer.experts.lora_B.normal_(std=0.1)  # type: ignore[union-attr, operator]
    report = export_native(mixture, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    A, B, scale = up.experts.expert(2)
    exact = up.weight.double() + scale * (B.double() @ A.double())
    got = written["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() <= exact.abs().max() * 2**-8
    assert (got == exact.to(torch.bfloat16)).float().mean() > 0.999
    assert written["model.layers.1.block_sparse_moe.gate.weight"].dtype == torch.float32
    assert report.agreement is not None
    assert report.agreement.difference < 1e-4 < report.agreement.after_rounding


def test_shards_are_small_and_complete(tmp_path: Path) -> None:
    mixture = mixture_on("llama")
    limit = 40_000
    report = export_native(mixture, tmp_path, max_shard_bytes=limit, check=False)
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) == report.forecast.num_shards > 3
    weights = {path.name: load_file(path) for path in shards}
    for held in weights.values():
        assert sum(tensor.nbytes for tensor in held.values()) <= limit or len(held) == 1
    assert {name: file for file, held in weights.items() for name in held} == index["weight_map"]
    assert index["metadata"]["total_size"] == report.forecast.exported_bytes
    torch.testing.assert_close(loaded(tmp_path)[1], said(mixture), rtol=1e-5, atol=2e-5)


def test_a_dry_run_writes_nothing_and_forecasts_the_truth(tmp_path: Path) -> None:
    for base in ("llama", "granite", "qwen2"):
        mixture = mixture_on(base)
        dry = export_native(mixture, tmp_path / base, dry_run=True)
        assert not (tmp_path / base).exists()
        export_native(mixture, tmp_path / base, check=False)
        held = load_file(tmp_path / base / "model.safetensors")
        assert dry.forecast.exported_bytes == sum(tensor.nbytes for tensor in held.values())
        assert dry.forecast.dense_bytes == 4 * tiny(base, num_hidden_layers=3).num_parameters()
        assert dry.files == ()
        assert dry.agreement is None


def test_the_mixture_is_left_as_it_was(tmp_path: Path) -> None:
    mixture = mixture_on("llama")
    said(mixture)
    mixture.model.train()
    before, trace = snapshot(mixture.model), mixture.state.trace
    export_native(mixture, tmp_path)
    assert same(before, snapshot(mixture.model))
    assert mixture.state.trace is trace
    assert mixture.model.training
    assert len(mixture.trainable_parameters()) > 0


def test_the_check_finds_a_wrong_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = Mixtral.entries

    def swapped(self: Mixtral, block: Any, base: Any) -> Any:
        names = {"w1": "w3", "w3": "w1"}
        for entry in entries(self, block, base):
            parts = [names.get(part, part) for part in entry.name.split(".")]
            yield entry._replace(name=".".join(parts))

    monkeypatch.setattr(Mixtral, "entries", swapped)
    for dtype in (torch.float32, torch.bfloat16):
        mixture = mixture_on("llama")
        mixture.model.to(dtype)
        with pytest.raises(CheckpointError, match="from the mixture's, more than"):
            export_native(mixture, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_check_finds_one_wrong_number_in_a_16_bit_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(path: Path, entries: list[Entry], metadata: dict[str, str]) -> None:
        tensors = {entry.name: entry.make().to(DTYPES[entry.header.dtype]).clone() for entry in entries}
        tensors["model.norm.weight"][0] += 0.01
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr("molex.io.shards.write_stream", careless)
    mixture = mixture_on("llama")
    mixture.model.to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"not written as computed: model\.norm\.weight differs"):
        export_native(mixture, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_check_finds_a_tensor_that_has_no_place(tmp_path: Path) -> None:
    mixture = mixture_on("llama")
    mixture.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(CheckpointError, match="unexpected_keys extra"):
        export_native(mixture, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "failing", ["shards.write_stream", "native.export._write_tokenizer", "native.export.check_export"]
)
def test_an_interrupt_leaves_the_folder_as_it_was(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        for path in args:
            if isinstance(path, Path) and path.suffix:
                path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    monkeypatch.setattr(f"molex.io.{failing}", interrupt)
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            export_native(mixture_on("llama"), tmp_path / name)
    assert file_bytes(tmp_path / "old") == {"notes.txt": b"mine"}
    assert not (tmp_path / "new").exists()


def test_a_base_without_a_folder_gives_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("of something else")
    monkeypatch.chdir(tmp_path)
    export_native(mixture_on("llama"), tmp_path / "out", check=False)
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_tokenizer_and_generation_settings_come_along(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text("{}")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    mixture = mixture_on("llama")
    mixture.model.config._name_or_path = str(base)  # type: ignore[union-attr]
    mixture.model.generation_config = GenerationConfig(do_sample=True, top_p=0.7)  # type: ignore[assignment]
    report = export_native(mixture, tmp_path / "out", check=False)
    assert {"tokenizer.json", "chat_template.jinja"} < set(report.files) == set(file_bytes(tmp_path / "out"))
    assert GenerationConfig.from_pretrained(tmp_path / "out").top_p == 0.7

    class Mine:
        def save_pretrained(self, folder: str) -> None:
            Path(folder, "tokenizer.json").write_text("mine")

    export_native(mixture, tmp_path / "other", tokenizer=Mine(), check=False)
    assert (tmp_path / "other" / "tokenizer.json").read_text() == "mine"
    assert not (tmp_path / "other" / "chat_template.jinja").exists()


def test_the_command_line_exports_and_forecasts(tmp_path: Path) -> None:
    mixture = mixture_on("llama")
    mixture.model.save_pretrained(tmp_path / "mixture")  # type: ignore[union-attr, operator]

    def run(*options: str) -> Any:
        arguments = ["export", str(tmp_path / "mixture"), "--out", str(tmp_path / "out"), *options]
        return CliRunner().invoke(app, arguments)

    native = ("--to", "native", "--target", "vllm", "--json")
    (forecast,) = json.loads(run(*native, "--dry-run").stdout)
    assert not (tmp_path / "out").exists()
    (report,) = json.loads(run(*native).stdout)
    assert report["exported_bytes"] == forecast["exported_bytes"]
    assert report["difference"] < 1e-4
    torch.testing.assert_close(loaded(tmp_path / "out")[1], said(mixture), rtol=1e-5, atol=2e-5)
    assert isinstance(run(*native).exception, CheckpointError)
    assert isinstance(run("--to", "peft", "--dry-run").exception, ConfigError)
    shown = run("--to", "native", "--dry-run").stdout
    assert "mixtral" in shown
    assert "ratio" in shown


def test_the_page_has_the_families_as_they_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "exporting.md").read_text()
    known = sorted((families[name] for name in families), key=lambda family: family.fallback)
    rows = []
    for base in sorted({base for family in known for base in family.serves}):
        cells = []
        for target in TARGETS:
            names = [f"`{family.model_type}`" for family in known if target in family.serves.get(base, ())]
            cells.append(", ".join(names) or "no")
        rows.append(f"| `{base}` | {' | '.join(cells)} |")
    rows += [f"| `{name}` | {families[name].condition} |" for name in sorted(families)]
    table = page.split("<!-- families -->")[1].split("<!-- /families -->")[0]
    assert [line for line in table.splitlines() if line.startswith("| `")] == rows
    assert all(families[name].model_type == name for name in families)
