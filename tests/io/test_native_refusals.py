"""What no native architecture computes is refused, with the reason, before a folder is touched."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

import molex
from molex import Mixture
from molex.errors import CheckpointError, ConfigError, MolexError, StateError, TargetError
from molex.io.native import export_native
from tests.io.mixtures import of_preset
from tests.io.native import LAYER_1, LLAMA3, mixture_on
from tests.models import tiny


def refuses(mixture: Mixture, folder: Path, error: type[MolexError], match: str, **options: Any) -> None:
    for dry_run in (True, False):
        with pytest.raises(error, match=match):
            export_native(mixture, folder / "out", dry_run=dry_run, **options)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("preset", ["mola", "loramoe", "dynmole", "meteora", "hydralora", "poly"])
def test_linears_that_route_themselves(preset: str, tmp_path: Path) -> None:
    refuses(of_preset(preset), tmp_path, ConfigError, "each linear chooses experts of its own.*mixlora")


def test_a_router_over_the_whole_model(tmp_path: Path) -> None:
    refuses(of_preset("xlora"), tmp_path, ConfigError, "after a first pass")


@pytest.mark.parametrize("router", ["dynamic", "sigmoid", "task"])
def test_rules_that_are_no_softmax_over_the_top_k(router: str, tmp_path: Path) -> None:
    top_k = {"top_k": 2} if router == "sigmoid" else {}
    config = molex.preset("mixlora", router=router, num_experts=4, rank=4, losses=(), **top_k)
    mixture = molex.convert(tiny("llama"), config)
    refuses(mixture, tmp_path, ConfigError, "is not a softmax over its k largest logits")


def test_weights_that_leave_the_base_a_share(tmp_path: Path) -> None:
    refuses(mixture_on("llama", renormalise=False), tmp_path, ConfigError, "leaves the base the rest")


@pytest.mark.parametrize("overrides", [{"allocation": (2, 4, 4)}, {"allocation": (2, 3, 4), "router": "soft"}])
def test_counts_that_copies_cannot_even_out(overrides: dict[str, Any], tmp_path: Path) -> None:
    refuses(mixture_on("llama", **overrides), tmp_path, ConfigError, "layers have 2 to 4 experts.*allocation=None")


def test_nothing_to_choose(tmp_path: Path) -> None:
    refuses(mixture_on("llama", num_experts=1, top_k=1), tmp_path, ConfigError, "merge it into the base")


@pytest.mark.parametrize("base", ["gpt2", "phi3", "opt"])
def test_blocks_of_another_make(base: str, tmp_path: Path) -> None:
    refuses(mixture_on(base), tmp_path, ConfigError, "only in gate_proj, up_proj and down_proj")


def test_architectures_without_a_native_one(tmp_path: Path) -> None:
    for base in ("gemma2", "gemma3_text"):
        refuses(mixture_on(base), tmp_path, TargetError, f"no native architecture is .* a '{base}' base")


@pytest.mark.parametrize(
    ("base", "fields", "target", "reason"),
    [
        ("mistral", {}, "llama.cpp", "sliding_window=16"),
        ("llama", {"hidden_act": "gelu"}, "vllm", "computes silu"),
        ("llama", {"attention_bias": True}, "vllm", "has no biases"),
        ("llama", {"mlp_bias": True}, "transformers", "mlp_bias"),
        ("qwen3", {"attention_bias": True}, "llama.cpp", "no bias on o_proj"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True,
                   "sliding_window": 8, "num_hidden_layers": 2}, "transformers", "sliding_window=8"),
        ("qwen2", {"head_dim": 16}, "vllm", "no head_dim"),
        ("granite", {"attention_bias": True}, "vllm", "no attention biases"),
        ("qwen2", {"head_dim": 16}, "llama.cpp", "no head_dim"),
        ("llama", {"attention_bias": True, "rope_parameters": LLAMA3}, "llama.cpp",
         "mixtral: .*biases; granitemoe: .*rope_type"),
        ("olmo2", {}, "vllm", "mixture on a 'olmo2' base under vllm"),
        ("olmo2", {}, "llama.cpp", "mixture on a 'olmo2' base under llama.cpp"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "llama.cpp",
         "the base has 'dynamic'"),
    ],
)  # fmt: skip
def test_conditions(base: str, fields: dict[str, Any], target: str, reason: str, tmp_path: Path) -> None:
    refuses(mixture_on(base, fields), tmp_path, TargetError, reason, target=target)


def test_wrong_names(tmp_path: Path) -> None:
    mixture = mixture_on("llama")
    refuses(
        mixture, tmp_path, ConfigError, "target='sglang'; choose from transformers, vllm, llama.cpp", target="sglang"
    )
    refuses(mixture, tmp_path, ConfigError, "unknown native family 'mixtrall'.*'mixtral'", family="mixtrall")
    refuses(
        mixture,
        tmp_path,
        TargetError,
        "qwen3_moe is not exactly a mixture on a 'llama' base under transformers; known",
        family="qwen3_moe",
    )
    refuses(mixture, tmp_path, ConfigError, "max_shard_bytes=0", max_shard_bytes=0)


def test_weights_that_are_elsewhere_or_codes(tmp_path: Path) -> None:
    mixture = mixture_on("llama")
    norm = mixture.model.model.norm  # type: ignore[union-attr]
    norm.weight = torch.nn.Parameter(norm.weight.to("meta"))  # type: ignore[union-attr]
    refuses(mixture, tmp_path, StateError, "model.norm.weight is offloaded or sharded")
    norm.weight = torch.nn.Parameter(torch.zeros(32).to(torch.float8_e4m3fn), requires_grad=False)
    refuses(mixture, tmp_path, TargetError, "model.norm.weight is torch.float8_e4m3fn")
    mixture = mixture_on("llama")
    mixture.model.config.quantization_config = {"quant_method": "bitsandbytes"}  # type: ignore[union-attr]
    refuses(mixture, tmp_path, TargetError, "the base is quantised")


def test_models_that_are_no_causal_language_models(tmp_path: Path) -> None:
    config = tiny("llama").config
    model = LlamaForSequenceClassification(config)
    mixture = molex.convert(model, molex.preset("mixlora", also_train=("score",)))
    refuses(mixture, tmp_path, TargetError, "LlamaForSequenceClassification is no stack model.layers under an lm_head")


def test_a_reverted_mixture(tmp_path: Path) -> None:
    mixture = mixture_on("llama")
    mixture.revert()
    refuses(mixture, tmp_path, StateError, "is not converted")


def test_a_folder_with_a_model_in_it(tmp_path: Path) -> None:
    mixture = mixture_on("llama", targets=LAYER_1)
    export_native(mixture, tmp_path, check=False)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"holds .* already; give an empty or a new folder"):
        export_native(mixture, tmp_path, check=False)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="are free; give another folder"):
        export_native(mixture_on("llama"), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()
