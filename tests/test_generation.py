"""generate() on a converted model: a KV cache changes nothing, padding and beams change nothing, for every preset."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

import molex
from molex import Mixture
from molex.presets import presets
from molex.routers.arrow import ArrowRouter
from tests.models import ENCODER_DECODER, VOCABULARY, tiny

# what a preset needs to fit a model of two layers and two tasks; a new preset needs no line here if its defaults do
SMALL: dict[str, dict[str, Any]] = {
    "mola": {"allocation": (2, 3)},
    "mos": {"rank": 2},
    "mtlora": {"num_experts": 3},
    "poly": {"num_tasks": 2, "alpha": 4},
    "mhr": {"num_tasks": 2, "alpha": 4},
    "xlora": {"num_experts": 3, "layerwise": True, "temperature": 0.2},
    "lora-mixer hard": {"num_experts": 4, "stage": "hard"},
    "mixlora dora": {"num_experts": 4, "experts": "dora"},
}
METHODS = [*presets, *(name for name in SMALL if " " in name)]
BY_TASK = ("mtlora", "poly", "mhr", "lora-mixer hard")
ELSEWHERE = [
    ("qwen2", "mixlora"),
    ("gemma2", "mola"),
    ("gpt2", "hydralora"),
    ("opt", "loramoe"),
    ("mamba", "lora-mixer ssm"),
    ("mamba2", "xlora ssm"),
    ("t5", "mixlora"),
    ("t5_gated", "dynmole"),
    ("t5", "mtlora"),
]
NEW_TOKENS = 5
PROMPTS = ([3, 14, 15, 9, 26, 5, 35], [27, 18, 28])


@cache
def converted(method: str, architecture: str = "llama") -> tuple[PreTrainedModel, Mixture]:
    """A mixture of random experts under a random router, tasks 0 and 1 set for two sequences."""
    torch.manual_seed(0)
    preset, _, variant = method.partition(" ")
    targets = {"targets": "ssm"} if variant == "ssm" else {}
    model = tiny(architecture)
    mixture = molex.convert(model, molex.preset(preset, **SMALL.get(method, SMALL.get(preset, {})), **targets))
    randomise(model, mixture)
    mixture.set_tasks([0, 1] if method in BY_TASK else None)
    return model, mixture


def randomise(model: PreTrainedModel, mixture: Mixture) -> None:
    """Experts that matter and routers that choose differently from token to token."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if mixture.owns(name) and not name.endswith((".lora_A", ".magnitude")):
                parameter.normal_(std=0.3)
    for layer in mixture.layers.values():
        if isinstance(layer.router, ArrowRouter):
            for i, rank in enumerate(layer.experts.ranks):
                A, B = torch.randn(rank, layer.in_features) / 6, torch.randn(layer.out_features, rank) / 3
                layer.load_expert(i, str(i), molex.LoRA(A, B, 1.0))


def padded(prompts: tuple[list[int], ...] = PROMPTS) -> dict[str, Tensor]:
    """Left-padded ids and their mask."""
    length = max(map(len, prompts))
    rows = [[0] * (length - len(prompt)) + prompt for prompt in prompts]
    masks = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def generate(model: PreTrainedModel, batch: dict[str, Tensor], **settings: Any) -> Any:
    torch.manual_seed(1)
    fixed = {
        "max_new_tokens": NEW_TOKENS,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
    }
    return model.generate(**batch, **fixed, **{"do_sample": False, **settings})


def assert_cache_changes_nothing(model: PreTrainedModel, **settings: Any) -> Any:
    cached = generate(model, padded(), **settings)
    plain = generate(model, padded(), use_cache=False, **settings)
    assert cached.sequences.tolist() == plain.sequences.tolist()
    assert_same(torch.stack(cached.logits), torch.stack(plain.logits))
    return cached


def assert_same(got: Tensor, expected: Tensor) -> None:
    """To 1e-5, or to as much of the largest logit where that is above 1 (T5's head does not scale them down)."""
    error, scale = (got - expected).abs().max(), max(1.0, float(expected.abs().max()))
    assert error <= 1e-5 * scale, f"differ by {error:.3g} at a scale of {scale:.3g}"


@pytest.mark.parametrize("method", METHODS)
def test_greedy_steps_equal_the_full_forward(method: str) -> None:
    """The logits of each cached step are those of one forward over the whole left-padded batch."""
    model, _ = converted(method)
    batch = padded()
    cached = assert_cache_changes_nothing(model)
    mask = nn.functional.pad(batch["attention_mask"], (0, NEW_TOKENS), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(cached.sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits
    start = batch["input_ids"].shape[1] - 1
    assert_same(torch.stack(cached.logits, dim=1), logits[:, start : start + NEW_TOKENS])


@pytest.mark.parametrize("method", METHODS)
def test_a_padded_batch_equals_each_row_alone(method: str) -> None:
    model, mixture = converted(method)
    together = generate(model, padded())
    for row, prompt in enumerate(PROMPTS):
        with mixture.using(tasks=[row] if method in BY_TASK else None):
            alone = generate(model, {"input_ids": torch.tensor([prompt])})
        assert alone.sequences[0, -NEW_TOKENS:].tolist() == together.sequences[row, -NEW_TOKENS:].tolist()
        assert_same(torch.stack(alone.logits)[:, 0], torch.stack(together.logits)[:, row])


@pytest.mark.parametrize("method", METHODS)
def test_beams_and_samples(method: str) -> None:
    """The cache is reordered and repeated over beams and returned sequences; so are task ids."""
    model, _ = converted(method)
    beams = assert_cache_changes_nothing(model, num_beams=4, num_return_sequences=2)
    samples = assert_cache_changes_nothing(model, do_sample=True, num_return_sequences=2)
    assert beams.sequences.shape[0] == samples.sequences.shape[0] == 4


@pytest.mark.parametrize("method", METHODS)
def test_recording_gives_one_entry_per_forward(method: str) -> None:
    model, mixture = converted(method)
    batch = padded()
    with mixture.record() as steps:
        generate(model, batch)
    num_tokens = [{d.routing.expert_ids.shape[0] for d in step.values()} for step in steps]
    assert num_tokens == [{batch["input_ids"].numel()}, *[{2}] * (NEW_TOKENS - 1)]
    assert len({frozenset(step) for step in steps}) == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_experts_matter(method: str) -> None:
    """Without this, everything above would pass on a model whose experts are never called."""
    model, mixture = converted(method)
    mixed = generate(model, padded()).logits[0]
    with mixture.disabled():
        assert (generate(model, padded()).logits[0] - mixed).abs().max() > 0.05


@pytest.mark.parametrize("method", BY_TASK)
def test_tasks_follow_their_sequences_through_beams(method: str) -> None:
    model, mixture = converted(method)
    together = generate(model, padded(), num_beams=4, num_return_sequences=2)
    for row, prompt in enumerate(PROMPTS):
        with mixture.using(tasks=[row]):
            alone = generate(model, {"input_ids": torch.tensor([prompt])}, num_beams=4, num_return_sequences=2)
        own = slice(2 * row, 2 * row + 2)
        assert alone.sequences[:, -NEW_TOKENS:].tolist() == together.sequences[own, -NEW_TOKENS:].tolist()
        assert_same(alone.sequences_scores, together.sequences_scores[own])
        with mixture.using(tasks=[1 - row]):
            other = generate(model, {"input_ids": torch.tensor([prompt])}, num_beams=4, num_return_sequences=2)
        assert (other.logits[0] - alone.logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["loramoe", "xlora"])
def test_a_named_expert_for_each_sequence(method: str) -> None:
    """Asked for by name, one for each sequence; None is the base alone."""
    model, mixture = converted(method)
    with mixture.using(adapters=["2", None]):
        together = assert_cache_changes_nothing(model, num_beams=4, num_return_sequences=2)
    for row, name in enumerate(["2", None]):
        with mixture.using(adapters=[name]):
            alone = generate(model, {"input_ids": torch.tensor([PROMPTS[row]])}, num_beams=4, num_return_sequences=2)
        own = slice(2 * row, 2 * row + 2)
        assert alone.sequences[:, -NEW_TOKENS:].tolist() == together.sequences[own, -NEW_TOKENS:].tolist()
    with mixture.disabled():
        base = generate(model, {"input_ids": torch.tensor([PROMPTS[1]])}, num_beams=4, num_return_sequences=2)
    assert_same(torch.stack(alone.logits), torch.stack(base.logits))


@pytest.mark.parametrize(("architecture", "method"), ELSEWHERE)
def test_other_architectures(architecture: str, method: str) -> None:
    model, mixture = converted(method, architecture)
    assert_cache_changes_nothing(model)
    assert_cache_changes_nothing(model, num_beams=4, num_return_sequences=2)
    together = generate(model, padded())
    for row, prompt in enumerate(PROMPTS):
        with mixture.using(tasks=[row] if method in BY_TASK else None):
            alone = generate(model, {"input_ids": torch.tensor([prompt])})
        assert alone.sequences[0, -NEW_TOKENS:].tolist() == together.sequences[row, -NEW_TOKENS:].tolist()
    with mixture.record() as steps:
        generate(model, padded())
    assert len(steps) == NEW_TOKENS
    assert (len(steps[0]) > len(steps[1])) == (architecture in ENCODER_DECODER), "an encoder runs once"


@pytest.mark.parametrize("method", ["mola", "mixlora", "xlora"])
def test_prompt_lookup_accepts_and_rejects_as_greedy_does(method: str) -> None:
    """Assisted decoding feeds several tokens at once and crops the cache where they were wrong."""
    model, mixture = converted(method)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])}
    with mixture.record() as steps:
        assisted = model.generate(**batch, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3)
    greedy = model.generate(**batch, max_new_tokens=24, do_sample=False)
    assert assisted.tolist() == greedy.tolist()
    sizes = {d.routing.expert_ids.shape[0] for step in steps[1:] for d in step.values()}
    assert max(sizes) > 1, "no candidate was ever tried"


@pytest.mark.parametrize("method", ["mola", "mixlora", "xlora"])
def test_static_caches_and_second_turns(method: str) -> None:
    """A cache of fixed length, and one handed back and continued with a longer prompt."""
    model, _ = converted(method)
    dynamic = generate(model, padded(), num_beams=4)
    static = generate(model, padded(), num_beams=4, cache_implementation="static")
    assert static.sequences.tolist() == dynamic.sequences.tolist()
    first = generate(model, {"input_ids": torch.tensor([PROMPTS[0]])})
    longer = {"input_ids": torch.cat([first.sequences, torch.tensor([PROMPTS[1]])], dim=1)}
    continued = generate(model, longer, past_key_values=first.past_key_values)
    afresh = generate(model, longer)
    assert continued.sequences.tolist() == afresh.sequences.tolist()
    assert_same(torch.stack(continued.logits), torch.stack(afresh.logits))


@pytest.mark.parametrize("method", ["mola", "mixlora", "moram"])
def test_continuous_batching_equals_each_prompt_alone(method: str) -> None:
    """transformers packs all prompts into one row, with its own paged cache."""
    model, _ = converted(method)
    prompts = [*PROMPTS, [VOCABULARY - 1, 8]]
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    paged = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    outputs = model.generate_batch(prompts, settings, paged).values()
    for prompt, output in zip(prompts, outputs, strict=True):
        alone = generate(model, {"input_ids": torch.tensor([prompt])})
        assert output.generated_tokens == alone.sequences[0, -NEW_TOKENS:].tolist()
