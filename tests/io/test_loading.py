"""What is saved comes back: every preset, many architectures, every bit; and training goes on from there."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import hub

import molex
from molex import Mixture
from molex.errors import CheckpointError, ConfigError, StateError
from tests.cases import PRESETS
from tests.io.mixtures import file_bytes, logits, of_preset, same, scrambled, snapshot
from tests.models import ENCODER_DECODER, STATE_SPACE, batch_for, tiny

LINEAR = molex.preset("mola", allocation=None, num_experts=3, rank=(1, 4, 2), top_k=2)


def reloaded(mixture: Mixture, model: torch.nn.Module, folder: Path) -> Mixture:
    """Saves, loads onto another model, and checks that a second save writes the same bytes."""
    mixture.save(folder / "first")
    loaded = molex.load(model, folder / "first")
    loaded.save(folder / "second")
    assert file_bytes(folder / "first") == file_bytes(folder / "second")
    assert same(mixture.state_dict(), loaded.state_dict())
    assert loaded.config == mixture.config
    for name, layer in mixture.layers.items():
        assert loaded.layers[name].experts.names == layer.experts.names
        assert loaded.layers[name].experts.ranks == layer.experts.ranks
    return loaded


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_comes_back_bit_for_bit(preset: str, tmp_path: Path) -> None:
    mixture = of_preset(preset)
    with torch.random.fork_rng():
        torch.manual_seed(1)  # loading must not depend on the draws of a fresh conversion
        loaded = reloaded(mixture, tiny("llama"), tmp_path)
    assert torch.equal(logits(mixture), logits(loaded))
    assert {n for n, p in mixture.model.named_parameters() if p.requires_grad} == {
        n for n, p in loaded.model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    "architecture", ["gemma2", "phi3", "gpt2", "opt", "mamba", "mamba2", "bert_classifier", "t5", "t5_gated"]
)
def test_architectures_come_back_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    config = LINEAR
    if architecture in STATE_SPACE:
        config = config.override({"targets": ("ssm",)})
    mixture = scrambled(molex.convert(tiny(architecture), config))
    assert torch.equal(logits(mixture), logits(reloaded(mixture, tiny(architecture), tmp_path)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_experts_keep_their_own_dtype_on_other_bases(dtype: torch.dtype, tmp_path: Path) -> None:
    mixture = scrambled(molex.convert(tiny("llama").to(dtype), LINEAR.override({"also_train": ("norm",)})))
    loaded = reloaded(mixture, tiny("llama").to(dtype), tmp_path)
    assert loaded.layers["model.layers.0.mlp.up_proj"].experts.lora_A.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(logits(mixture), logits(loaded))


def test_grown_memories_come_back_frozen_as_they_were(tmp_path: Path) -> None:
    mixture = of_preset("moram")
    mixture.grow(3)
    mixture.grow(2)
    loaded = reloaded(scrambled(mixture), tiny("llama"), tmp_path)
    assert torch.equal(logits(mixture), logits(loaded))
    bank = loaded.layers["model.layers.0.self_attn.q_proj"].experts
    assert (len(bank.frozen_A), len(bank.lora_A)) == (11, 2)
    assert bank.lora_A.requires_grad
    assert not bank.frozen_A.requires_grad
    loaded.grow(1)
    assert torch.isfinite(logits(loaded)).all()


def test_the_stage_of_lora_mixer_comes_back(tmp_path: Path) -> None:
    mixture = of_preset("lora-mixer")
    soft = logits(mixture)
    for layer in mixture.layers.values():
        layer.router.stage = "hard"
    loaded = reloaded(mixture, tiny("llama"), tmp_path)
    assert {layer.router.stage for layer in loaded.layers.values()} == {"hard"}
    assert torch.equal(logits(mixture), logits(loaded))
    assert not torch.equal(soft, logits(loaded))


def test_modules_trained_whole_come_back_tied_or_not(tmp_path: Path) -> None:
    for tied in (True, False):
        fields = {"tie_word_embeddings": tied}
        config = LINEAR.override({"also_train": ("lm_head", "embed_tokens")})
        mixture = scrambled(molex.convert(tiny("llama", **fields), config))
        loaded = reloaded(mixture, tiny("llama", **fields), tmp_path / str(tied))
        assert torch.equal(logits(mixture), logits(loaded))
        assert torch.equal(loaded.model.lm_head.weight, loaded.model.model.embed_tokens.weight) is tied


def test_a_classifier_head_is_part_of_the_mixture(tmp_path: Path) -> None:
    mixture = scrambled(molex.convert(tiny("bert_classifier"), LINEAR.override({"also_train": ("classifier",)})))
    fresh = tiny("bert_classifier")
    fresh.classifier.weight.data.normal_()
    assert torch.equal(logits(mixture), logits(reloaded(mixture, fresh, tmp_path)))


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    mixture = of_preset("smora")
    twin = reloaded(mixture, tiny("llama"), tmp_path)
    losses = []
    for run in (mixture, twin):
        optimizer = torch.optim.SGD(run.trainable_parameters(), lr=0.1)
        run.model.train()
        for _ in range(3):
            loss = run.model(**batch_for(run.model)).loss + run.aux_loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]
    assert losses[0] != losses[2]
    assert same(mixture.state_dict(), twin.state_dict())


def test_an_unequal_allocation_comes_back(tmp_path: Path) -> None:
    mixture = of_preset("mola", allocation=[3, 2], rank=2)
    loaded = reloaded(mixture, tiny("llama"), tmp_path)
    assert [layer.experts.num_experts for layer in loaded.layers.values()] == [3] * 7 + [2] * 7


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_folder_alone_loads_the_base_it_names(base: Path, tmp_path: Path) -> None:
    mixture = of_preset("mixlora", LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    mixture.save(tmp_path / "out")
    loaded = molex.load(str(tmp_path / "out"))
    assert isinstance(loaded.model, LlamaForCausalLM)
    assert loaded.model.dtype == torch.bfloat16
    assert torch.equal(logits(mixture), logits(loaded))
    assert molex.load(tmp_path / "out", dtype=torch.float32).model.dtype == torch.float32


@pytest.mark.parametrize("architecture", ["bert_classifier", *ENCODER_DECODER])
def test_the_class_of_the_base_is_remembered(architecture: str, tmp_path: Path) -> None:
    tiny(architecture).save_pretrained(tmp_path / "base")
    model = type(tiny(architecture)).from_pretrained(tmp_path / "base")
    mixture = scrambled(molex.convert(model, LINEAR))
    mixture.save(tmp_path / "out")
    loaded = molex.load(tmp_path / "out")
    assert type(loaded.model) is type(model)
    assert torch.equal(logits(mixture), logits(loaded))


def test_a_base_that_cannot_be_had_is_one_sentence(base: Path, tmp_path: Path) -> None:
    mixture = of_preset("lora", LlamaForCausalLM.from_pretrained(base))
    mixture.save(tmp_path / "out")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"its base '.*base' cannot be loaded .*molex.load\(model, path\)"):
        molex.load(tmp_path / "out")
    assert isinstance(molex.load(LlamaForCausalLM.from_pretrained(tmp_path / "elsewhere"), tmp_path / "out"), Mixture)


def test_a_base_made_in_memory_must_be_given(tmp_path: Path) -> None:
    of_preset("lora").save(tmp_path)
    with pytest.raises(CheckpointError, match="does not name its base"):
        molex.load(tmp_path)


def test_a_quantised_base_must_be_given(base: Path, tmp_path: Path) -> None:
    """Loaded by its name alone it would come back in full precision."""
    model = LlamaForCausalLM.from_pretrained(base)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    mixture = scrambled(molex.convert(model, LINEAR))
    mixture.save(tmp_path / "out")
    with pytest.raises(CheckpointError, match="a base quantised by bitsandbytes: load the base yourself"):
        molex.load(tmp_path / "out")
    assert torch.equal(logits(molex.load(LlamaForCausalLM.from_pretrained(base), tmp_path / "out")), logits(mixture))


def test_a_base_with_missing_weights_is_refused(base: Path, tmp_path: Path) -> None:
    of_preset("lora", LlamaForCausalLM.from_pretrained(base)).save(tmp_path / "out")
    headless = snapshot(tiny("llama"))
    del headless["model.norm.weight"]
    tiny("llama").save_pretrained(base, state_dict=headless)
    with pytest.raises(CheckpointError, match=r"lacks weights of the base: model\.norm\.weight"):
        molex.load(tmp_path / "out")


def hub_cache(cache: Path, repo_id: str, files: Path) -> None:
    """A cache as huggingface_hub leaves it after a download."""
    snapshots = cache / f"models--{repo_id.replace('/', '--')}"
    (snapshots / "refs").mkdir(parents=True)
    (snapshots / "refs" / "main").write_text("0" * 40)
    (snapshots / "snapshots").mkdir()
    files.rename(snapshots / "snapshots" / ("0" * 40))


def test_hub_ids_name_mixtures_and_bases(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub_cache(tmp_path / "cache", "someone/base", base)
    mixture = of_preset("hydralora", AutoModelForCausalLM.from_pretrained("someone/base"))
    mixture.save(tmp_path / "apart")
    mixture.model.save_pretrained(tmp_path / "together")
    hub_cache(tmp_path / "cache", "someone/apart", tmp_path / "apart")
    hub_cache(tmp_path / "cache", "someone/together", tmp_path / "together")
    for repo_id in ("someone/apart", "someone/together"):
        assert torch.equal(logits(molex.load(repo_id)), logits(mixture))
    assert torch.equal(logits(molex.load(tiny("llama"), "someone/apart")), logits(mixture))
    with pytest.raises(CheckpointError, match="someone/unknown is no folder here, nor does the hub give it"):
        molex.load("someone/unknown")


def test_wrong_calls_say_so(tmp_path: Path) -> None:
    mixture = of_preset("lora")
    mixture.save(tmp_path)
    with pytest.raises(StateError, match="is a mixture already"):
        molex.load(mixture.model, tmp_path)
    assert Mixture.of(mixture.model) is mixture
    with pytest.raises(ConfigError, match="give the mixture's folder"):
        molex.load(tiny("llama"))
    with pytest.raises(ConfigError, match=r"no model; call molex\.load\(model, path\)"):
        molex.load(str(tmp_path), tmp_path)


def test_revert_after_loading_gives_the_base(tmp_path: Path) -> None:
    of_preset("mos").save(tmp_path)
    model = tiny("llama")
    before = deepcopy(model)
    molex.load(model, tmp_path).revert()
    assert same(snapshot(model), snapshot(before))
    assert "save_pretrained" not in vars(model)


def test_a_base_of_other_files_than_safetensors_is_not_read(base: Path, tmp_path: Path) -> None:
    mixture = of_preset("lora", LlamaForCausalLM.from_pretrained(base))
    mixture.save(tmp_path / "out")
    torch.save(tiny("llama").state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        molex.load(tmp_path / "out")
