"""Every preset on a real (tiny) model: its layers against the paper's loop, its settings, counts and laws."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import molex
from molex.config import MixtureConfig
from molex.errors import ConfigError, MolexError, StateError, TargetError
from molex.experts import expert_kinds
from molex.experts.dora import DoRABank
from molex.experts.lora import LoRABank
from molex.experts.shards import ShardBank
from molex.losses import losses
from molex.mixture import Mixture
from molex.presets import preset, presets
from molex.routers import BalancedRouter, routers
from molex.routers.scalings import ScalingsRouter
from tests import equations as eq
from tests.cases import EXPERTS, LOSSES, PRESETS, ROUTERS
from tests.equations import Token
from tests.models import batch_for, tiny

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
ROWS, LENGTH = 2, 5
# chosen by A x or v x alone: with random experts a near-tie that 16 bits turn over changes a token's whole output
HARD_CHOICES = ("flylora", "arrow")

every_preset = pytest.mark.parametrize("name", presets)


def config_of(name: str, **overrides: Any) -> MixtureConfig:
    assert name in PRESETS, f"preset {name!r} has no row in tests/cases.py"
    return preset(name, **{**PRESETS[name].overrides, **overrides})


def mixture_of(config: MixtureConfig, dtype: torch.dtype = torch.float32, **model: Any) -> Mixture:
    """A converted tiny Llama with every parameter of the mixture random, in evaluation mode, tasks set."""
    mixture = molex.convert(tiny("llama", **model).to(dtype), config)
    if dtype == torch.float64:
        mixture.model.double()  # routers too, whose masters are float32
    with torch.no_grad():
        for name, parameter in mixture.model.named_parameters():
            if mixture.owns(name):
                parameter.copy_(0.3 * torch.randn_like(parameter))
        for name, buffer in mixture.model.named_buffers():
            if name.endswith((".bias", ".prototypes")) and mixture.owns(name):
                buffer.copy_(0.3 * torch.randn_like(buffer))
    mixture.set_tasks([0, 1])
    mixture.model.eval()
    return mixture


def padded_batch() -> dict[str, Tensor]:
    batch = batch_for(tiny("llama"), ROWS, LENGTH)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, :2] = 0
    return {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": batch["labels"].where(mask > 0, -100)}


def assert_near(got: Tensor, truth: Tensor, dtype: torch.dtype, what: str, slack: float = 1) -> None:
    limit = slack * TOLERANCE[dtype] * max(1.0, float(truth.detach().abs().max()))
    error = float((got - truth).detach().abs().max())
    assert error <= limit, f"{what}: off by {error:.3g}, allowed {limit:.3g}"


def assert_gradients(ours: Tensor, papers: Tensor, leaves: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every gradient of a random projection, by name."""
    upstream = torch.randn_like(papers)
    tensors = [*leaves.values()]
    pairs = [torch.autograd.grad(y, tensors, upstream, allow_unused=True) for y in (ours, papers)]
    for name, leaf, got, wanted in zip(leaves, tensors, *pairs, strict=True):
        zeros = torch.zeros_like(leaf)
        got, wanted = zeros if got is None else got, zeros if wanted is None else wanted
        assert_near(got, wanted, dtype, f"gradient of {name}", slack=4)  # a sum over tokens, in another order


def layer_parameters(mixture: Mixture, layer: Any) -> dict[str, Tensor]:
    """All that the mixture adds to one layer, trained here whether the preset trains it or not."""
    pools = layer.experts.pool.named_parameters() if isinstance(layer.experts, ShardBank) else ()
    owned = {n: p for n, p in layer.named_parameters() if not n.startswith("base.")}
    owned.update(pools)
    owned.update((n, p) for n, p in mixture.model.named_parameters() if n.startswith("molex.router."))
    for parameter in owned.values():
        parameter.requires_grad_(True)
    return owned


def papers_gates(mixture: Mixture, layer_name: str) -> Callable[[Tensor, int, int], Tensor]:
    """(x (D,), token, task) -> the layer's gates by its router's equation."""
    layer: Any = mixture.layers[layer_name]
    if mixture.config.plain_targets and layer.form == "linear":
        return lambda x, token, task: x.new_ones(1)
    if layer.router is not None:
        case = ROUTERS[routers.name_of(type(mixture.config.router))]
        return lambda x, token, task: case.gates(layer.router, Token(x, _activations(layer, x), task))
    head: Any = mixture.model.molex["router"].head  # type: ignore[index]
    with mixture.disabled():
        hidden = mixture.model.model(**_inputs()).last_hidden_state.flatten(0, 1)  # type: ignore[operator]
    position, count = [*mixture.layers].index(layer_name), layer.experts.num_experts

    def xlora(x: Tensor, token: int, task: int) -> Tensor:
        inner = (head[0].weight @ hidden[token] + head[0].bias).clamp(min=0)
        logits = head[3].weight @ inner + head[3].bias
        return eq.softmax(logits[position * count : (position + 1) * count])

    return xlora


def _activations(layer: Any, x: Tensor) -> Tensor:
    return layer.experts.lora_A @ x if layer.router.needs_activations else x


def _inputs() -> dict[str, Tensor]:
    return {key: value for key, value in padded_batch().items() if key != "labels"}


@every_preset
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layers_are_the_papers(name: str, dtype: torch.dtype) -> None:
    """Every linear of the last block: output, and gradients of x and of all that the mixture adds."""
    mixture = mixture_of(config_of(name), dtype)
    mixture.model(**_inputs())
    row = EXPERTS[expert_kinds.name_of(type(mixture.config.experts))].row
    checked = 0
    for layer_name, layer in mixture.layers.items():
        if ".layers.1." not in layer_name or layer.form != "linear":
            continue
        leaves = layer_parameters(mixture, layer)
        if name == "xlora":
            mixture.model(**_inputs())
        x = torch.randn(ROWS, LENGTH, layer.in_features, dtype=dtype, requires_grad=True)
        y = layer(x)
        gates = papers_gates(mixture, layer_name)
        rows = [
            row(layer.experts, layer.base, x_D, gates(x_D, t, t // LENGTH)) for t, x_D in enumerate(x.flatten(0, 1))
        ]
        real = padded_batch()["attention_mask"].bool()  # a padded token's task is nobody's
        got, truth = y[real], torch.stack(rows).view_as(y)[real]
        assert_near(got, truth, dtype, layer_name)
        assert_gradients(got, truth, {"x": x, **leaves}, dtype)
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ranks", [3, [1, 4, 2, 3]], ids=["equal ranks", "unequal ranks"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_mixloras_ffn_is_the_textbooks(dtype: torch.dtype, ranks: Any, kind: str, bias: bool) -> None:
    """Σ_k w_k FFN_k(x): every expert a whole SwiGLU block with three updates of its own, summed after down."""
    config = preset("mixlora", num_experts=4, rank=ranks, plain_targets=(), experts=kind)
    mixture = mixture_of(config, dtype, mlp_bias=bias)
    mlp: Any = mixture.model.model.layers[1].mlp  # type: ignore[union-attr, index]
    row = {"lora": _lora_row, "dora": eq.dora_row}[kind]

    def expert(index: int, x: Tensor) -> Tensor:
        gate, up = (row(part.experts, part.base, index, x) for part in (mlp.gate_proj, mlp.up_proj))
        hidden = gate / (1 + (-gate).exp()) * up
        return row(mlp.down_proj.experts, mlp.down_proj.base, index, hidden)

    def textbook(x: Tensor) -> Tensor:
        p = eq.softmax(mlp.gate_proj.router.gate.weight @ x)
        chosen = eq.largest(p, 2)
        return sum((p[i] / sum(p[j] for j in chosen) * expert(i, x) for i in chosen), x.new_zeros(()))

    x = torch.randn(ROWS, LENGTH, 32, dtype=dtype, requires_grad=True)
    y, truth = mlp(x), torch.stack([textbook(x_D) for x_D in x.flatten(0, 1)]).view_as(x)
    assert_near(y, truth, dtype, "the block")
    leaves = {n: p for n, p in mlp.named_parameters() if ".base." not in n}
    assert len(leaves) == (10 if kind == "dora" else 7)
    assert_gradients(y, truth, {"x": x, **leaves}, dtype)


def _lora_row(bank: Any, base: Any, expert: int, x: Tensor) -> Tensor:
    return eq.base_row(base, x) + eq.lora_update(bank, expert, x)


@every_preset
@pytest.mark.parametrize("training", [False, True])
def test_aux_loss_is_the_sum_of_the_papers(name: str, training: bool) -> None:
    config = config_of(name)
    mixture = mixture_of(config, torch.float64)
    mixture.model.train(training)
    mixture.model(**padded_batch())
    trace = {n: d for n, d in mixture.state.trace.items() if d.routing.num_experts > 1}
    cases = [LOSSES[losses.name_of(type(loss))] for loss in config.losses]
    values = [case.value(loss, trace) for case, loss in zip(cases, config.losses, strict=True)]
    torch.testing.assert_close(mixture.aux_loss().double(), sum(values, torch.zeros(()).double()), check_dtype=False)


@every_preset
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_starts_as_the_base(name: str, dtype: torch.dtype) -> None:
    """Bit for bit, and experts and routers keep float32 masters over 16 bits."""
    model = tiny("llama").to(dtype)
    expected = model(**_inputs()).logits
    mixture = molex.convert(model, config_of(name))
    mixture.set_tasks([0, 1])
    assert torch.equal(model(**_inputs()).logits, expected)
    assert {p.dtype for n, p in model.named_parameters() if mixture.owns(n)} <= {torch.float32}
    for decision in mixture.state.trace.values():
        decision.routing.check()


@every_preset
def test_trains(name: str) -> None:
    """Twenty steps on one batch lower its loss; nothing but the mixture moves. Arrow has nothing to train."""
    torch.manual_seed(3)
    mixture = mixture_of(config_of(name, dropout=0.1))
    model, batch = mixture.model, padded_batch()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    if name == "arrow":
        assert mixture.trainable_parameters() == []
        return
    model.train()
    optimizer = torch.optim.AdamW(mixture.trainable_parameters(), lr=2e-2)
    start = float(model(**batch).loss.detach())
    for _ in range(20):
        task = model(**batch).loss
        (task + 0.01 * mixture.aux_loss()).backward()
        optimizer.step()
        mixture.step()
        optimizer.zero_grad()
    model.eval()
    assert float(model(**batch).loss.detach()) < start - 0.02
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved
    assert all(mixture.owns(n) for n in moved)


@every_preset
def test_evaluation_is_deterministic_with_dropout(name: str) -> None:
    mixture = mixture_of(config_of(name, dropout=0.5))
    assert torch.equal(mixture.model(**_inputs()).logits, mixture.model(**_inputs()).logits)


@every_preset
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast_after", [False, True])
def test_16_bits_stay_finite_and_near(name: str, dtype: torch.dtype, cast_after: bool) -> None:
    """`model.to(16 bits)` before or after the conversion."""
    torch.manual_seed(1)
    wide = mixture_of(config_of(name))
    expected = wide.model(**_inputs()).logits
    torch.manual_seed(1)
    mixture = mixture_of(config_of(name), torch.float32 if cast_after else dtype)
    mixture.model.to(dtype) if cast_after else None
    logits = mixture.model(**_inputs()).logits
    assert logits.dtype == dtype
    assert bool(logits.isfinite().all())
    if name not in HARD_CHOICES:
        assert float((logits.float() - expected).norm() / expected.norm()) < 0.2
    (mixture.model(**padded_batch()).loss.float() + mixture.aux_loss()).backward() if name != "arrow" else None


@every_preset
def test_autocast_trains(name: str) -> None:
    mixture = mixture_of(config_of(name))
    mixture.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mixture.model(**padded_batch()).loss + mixture.aux_loss()
    for decision in mixture.state.trace.values():
        decision.routing.check()
    if name == "arrow":
        return
    loss.backward()
    grads = [p.grad for p in mixture.trainable_parameters() if p.grad is not None]
    assert grads
    assert all(bool(grad.isfinite().all()) for grad in grads)


@every_preset
def test_small_and_odd_batches(name: str) -> None:
    """One token; a row of padding alone; a deep copy after a forward."""
    mixture = mixture_of(config_of(name))
    mixture.set_tasks([1])
    assert bool(mixture.model(input_ids=torch.tensor([[5]])).logits.isfinite().all())
    mixture.set_tasks([0, 1])
    batch = padded_batch()
    batch["attention_mask"][1] = 0
    out = mixture.model(**batch)
    assert bool(out.logits.isfinite().all())
    assert bool(mixture.aux_loss().isfinite())
    twin = copy.deepcopy(mixture.model)
    Mixture.of(twin).set_tasks([0, 1])
    assert torch.equal(twin(**_inputs()).logits, mixture.model(**_inputs()).logits)


@every_preset
def test_one_expert_works_or_is_refused(name: str) -> None:
    single = {"num_experts": 1, "top_k": 1, "keep_top_k": 1, "allocation": None, "rank": 2, "alpha": 2}
    known = {**config_of(name).to_dict(), **_part_settings(config_of(name))}
    overrides = {key: value for key, value in single.items() if key in known}
    if name in ("smora", "flylora", "moram"):
        overrides.pop("rank")
    config = config_of(name, **overrides)
    if name == "mtlora":
        with pytest.raises(ConfigError, match="num_experts >= 2"):
            molex.convert(tiny("llama"), config)
        return
    mixture = mixture_of(config)
    mixture.set_tasks([0, 0])
    mixture.model.train()
    loss = mixture.model(**padded_batch()).loss + mixture.aux_loss()
    loss.backward() if name != "arrow" else None
    mixture.step()
    assert mixture.stats()


def _part_settings(config: MixtureConfig) -> dict[str, Any]:
    plain = config.to_dict()
    return {**plain["router"], **plain["experts"], **{k: v for loss in plain["losses"] for k, v in loss.items()}}


@every_preset
def test_becomes_json_and_comes_back(name: str) -> None:
    config = config_of(name)
    assert MixtureConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert presets[name]().method == name
    for loss in config.losses:
        assert losses.name_of(type(loss)) in LOSSES


@every_preset
def test_unknown_settings_are_refused_with_a_near_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"num_expert.*did you mean 'num_experts'"):
        preset(name, num_expert=3)
    with pytest.raises(ConfigError, match="unknown keys"):
        MixtureConfig.from_dict({**config_of(name).to_dict(), "speed": 3})
    plain = config_of(name).to_dict()
    plain["router"]["speed"] = 3
    with pytest.raises(ConfigError, match="speed"):
        MixtureConfig.from_dict(plain)


def test_overrides_reach_the_part_that_has_them() -> None:
    config = preset("dynmole", top_p=0.5, balance_coefficient=0.25, entropy_coefficient=0.125, rank=5)
    assert _part_settings(config)["top_p"] == 0.5
    assert _part_settings(config)["balance_coefficient"] == 0.25
    assert _part_settings(config)["entropy_coefficient"] == 0.125
    assert config.rank == 5
    mhr = preset("mhr", num_heads=2).to_dict()
    assert mhr["router"]["num_heads"] == mhr["experts"]["num_heads"] == 2
    assert preset("mixlora", experts="dora").to_dict()["experts"]["kind"] == "dora"
    assert preset("mola", losses=["entropy"]).to_dict()["losses"][0]["kind"] == "entropy"
    assert preset("mola", router={"kind": "topk", "top_k": 1}).to_dict()["router"]["top_k"] == 1


def test_a_bare_number_of_experts_is_a_rectangle() -> None:
    """MoLA's own shape would overrule it silently."""
    assert preset("mola").allocation == "inverted_triangle"
    assert preset("mola", num_experts=8).allocation is None
    assert preset("mola", num_experts=8, allocation="diamond").allocation == "diamond"


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: preset("smora", rank=64), "num_experts"),
        (lambda: preset("mixtral"), "unknown preset"),
        (lambda: preset("lora", rank=0), "rank"),
        (lambda: preset("lora", rank=[4, 0]), "rank"),
        (lambda: preset("lora", num_experts=0), "num_experts"),
        (lambda: preset("lora", dropout=1.0), "dropout"),
        (lambda: preset("lora", scope="block"), "scope"),
        (lambda: preset("lora", scaling="alpha*rank"), "scaling"),
        (lambda: preset("lora", router=3), "router"),
        (lambda: preset("lora", experts="loha"), "experts"),
        (lambda: preset("mtlora", mode="other"), "mode"),
    ],
)
def test_wrong_settings_are_named(make: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make()


@pytest.mark.parametrize(
    ("name", "overrides", "word"),
    [
        ("mixlora", {"num_experts": 4, "top_k": 5}, "top_k=5 of 4"),
        ("mola", {"num_experts": 1}, "top_k=2 of 1"),
        ("smora", {"num_experts": 4}, "top_k=8 of 4"),
        ("meteora", {"num_experts": 3, "rank": [1, 2]}, "rank has 2 entries for 3"),
        ("mola", {"allocation": [2, 2, 2]}, "allocation"),
        ("mos", {"num_experts": 2}, "rank instead"),
        ("mhr", {"num_heads": 5}, "num_heads=5"),
        ("mixlora", {"experts": "shared_a"}, "scope"),
    ],
)
def test_what_cannot_be_converted_leaves_the_model_alone(name: str, overrides: dict[str, Any], word: str) -> None:
    model = tiny("llama")
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(MolexError, match=word):
        molex.convert(model, preset(name, **overrides))
    assert [n for n, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "overrides", "count"),
    [
        ("lora", {"rank": 64}, 159_907_840),
        ("lora", {"rank": 80}, 199_884_800),
        ("mixlora", {}, 203_423_744),
        ("mola", {"num_experts": 8}, 169_017_344),
        ("mola", {}, 105_635_840),
        ("mola", {"allocation": "diamond"}, 105_635_840),
        ("loramoe", {}, 38_486_016),
        ("loramoe", {"num_experts": 8}, 51_314_688),
    ],
)
def test_published_parameter_counts(
    llama_7b: PreTrainedModel, name: str, overrides: dict[str, Any], count: int
) -> None:
    mixture = molex.convert(llama_7b, preset(name, **overrides))
    try:
        assert mixture.num_parameters()["trainable"] == count
        assert mixture.num_parameters()["stored"] == count
    finally:
        mixture.revert()


@pytest.fixture(scope="module")
def llama_7b() -> PreTrainedModel:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))


@pytest.mark.parametrize("name", ["smora", "flylora"])
def test_balance_biases_move_in_step_alone_and_without_padding(name: str) -> None:
    mixture = mixture_of(config_of(name, bias_rate=0.5))
    found = {n: layer.router for n, layer in mixture.layers.items() if isinstance(layer.router, BalancedRouter)}
    assert found
    mixture.model.train()
    mixture.model(**padded_batch()).loss.backward()
    mixture.model.eval()
    before = {n: router.bias.clone() for n, router in found.items()}
    mixture.model(**_inputs())
    mixture.set_tasks(None)
    mixture.model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2)  # type: ignore[operator]
    assert all(torch.equal(router.bias, before[n]) for n, router in found.items())
    mixture.model.train()
    mixture.model(**padded_batch())
    mixture.step()
    real = padded_batch()["attention_mask"].flatten().bool()
    for layer_name, router in found.items():
        ids_TK = mixture.state.trace[layer_name].routing.expert_ids[real]
        counts = torch.tensor([float((ids_TK == e).sum()) for e in range(router.num_experts)])
        expected = before[layer_name] + 0.5 * (counts.mean() - counts).sign()
        torch.testing.assert_close(router.bias, expected)


def test_moram_grows() -> None:
    """Old memories stay, bit for bit, under AdamW with weight decay; new ones start at zero and train."""
    mixture = mixture_of(config_of("moram", num_experts=4, top_k=9, temperature=0.5))
    before = {n: layer.experts.materialize(1) for n, layer in mixture.layers.items()}
    assert all(isinstance(layer.experts, LoRABank) for layer in mixture.layers.values())
    mixture.grow(3)
    assert len(mixture.experts) == 7
    layer: Any = mixture.layers["model.layers.0.self_attn.q_proj"]
    assert float(layer.experts.materialize(5).abs().sum()) == 0
    assert mixture.num_parameters()["trainable"] == sum(
        3 * (layer.in_features + layer.out_features) for layer in mixture.layers.values()
    )
    mixture.model.train()
    optimizer = torch.optim.AdamW(mixture.trainable_parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(2):
        mixture.model(**padded_batch()).loss.backward()
        optimizer.step()
    for n, layer in mixture.layers.items():
        assert torch.equal(layer.experts.materialize(1), before[n])
        assert float(layer.experts.materialize(5).abs().sum()) > 0
        mixture.state.trace[n].routing.check()
    assert len(next(iter(mixture.stats().values())).counts) == 7


@pytest.mark.parametrize("name", ["lora", "mola", "flylora", "smora", "arrow", "hydralora", "poly", "mos"])
def test_what_cannot_grow_says_so(name: str) -> None:
    mixture = mixture_of(config_of(name))
    with pytest.raises(ConfigError, match="cannot grow"):
        mixture.grow(2)


def test_mos_shares_its_pools_and_keeps_its_indices() -> None:
    """One pool for each type of linear, parameters once on the model; indices travel with the layer."""
    mixture = mixture_of(config_of("mos"))
    parameters = [n for n, _ in mixture.model.named_parameters() if mixture.owns(n)]
    assert all(n.startswith("molex.pools.") for n in parameters)
    assert len(parameters) == 2 * 7
    first, second = (mixture.layers[f"model.layers.{i}.mlp.up_proj"].experts for i in (0, 1))
    assert isinstance(first, ShardBank)
    assert isinstance(second, ShardBank)
    assert first.pool is second.pool
    assert first.pool is not mixture.layers["model.layers.0.mlp.gate_proj"].experts.pool  # type: ignore[union-attr]
    num_private = first.pool.num_private
    own = [{i for i in bank.index_A.tolist() if i < num_private} for bank in (first, second)]
    assert own[0]
    assert not own[0] & own[1]
    other = mixture_of(config_of("mos"))
    assert not torch.equal(other.model(**_inputs()).logits, mixture.model(**_inputs()).logits)
    other.model.load_state_dict(mixture.model.state_dict())
    assert torch.equal(other.model(**_inputs()).logits, mixture.model(**_inputs()).logits)


def test_mos_trains_only_its_own_private_shards() -> None:
    mixture = mixture_of(config_of("mos"))
    bank: Any = mixture.layers["model.layers.1.mlp.up_proj"].experts
    layer = mixture.layers["model.layers.1.mlp.up_proj"]
    mixture.model(**_inputs())
    layer(torch.randn(ROWS, LENGTH, 32)).square().sum().backward()
    touched = {int(i) for i in bank.pool.pool_A.grad.abs().sum(1).nonzero()}
    assert touched == set(bank.index_A.tolist())


def test_loaded_adapters_are_used_and_missing_layers_add_nothing() -> None:
    """A fresh MeteoRA with one loaded expert, asked for by name, is that LoRA."""
    model = tiny("llama")
    mixture = molex.convert(model, config_of("meteora", rank=2, alpha=2))
    name = "model.layers.1.mlp.up_proj"
    A_RD, B_OR = torch.randn(2, 32), torch.randn(48, 2)
    x = torch.randn(1, 3, 32)
    mixture.load_expert(1, "law", {name: molex.LoRA(A_RD, B_OR, 0.3)})
    with mixture.using(adapters="law"):
        layer = mixture.layers[name]
        torch.testing.assert_close(layer(x), layer.base(x) + 0.3 * x @ A_RD.T @ B_OR.T)
        other = mixture.layers["model.layers.0.mlp.up_proj"]
        assert torch.equal(other(x), other.base(x))
    with pytest.raises(TargetError, match="not converted"):
        mixture.load_expert(1, "law", {"lm_head": molex.LoRA(A_RD, B_OR, 1.0)})
    with pytest.raises(ConfigError, match="no expert"), mixture.using(adapters="code"):
        pass


def rank_by_rank(mixture: Mixture, count: int) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """One layer of `count` single ranks in evaluation: it, x (D,), its A (R, D) and B (O, R), what it adds (O,)."""
    mixture.set_tasks(None)
    layer: Any = mixture.layers["model.layers.1.mlp.up_proj"]
    x_D = torch.randn(32, dtype=torch.float64)
    A_RD, B_OR = layer.experts.lora_A.detach(), layer.experts.lora_B.detach()
    assert len(A_RD) == B_OR.shape[1] == count
    with torch.no_grad():
        added_O = (layer(x_D[None, None]) - layer.base(x_D)).flatten()
    return layer, x_D, A_RD, B_OR, added_O


def test_smoras_update_has_the_papers_scale() -> None:
    """α Σ_i p_i b_i (a_i x) over the best k sigmoid scores, Σ p = 1: neither k, r nor the rank of an expert divides."""
    mixture = mixture_of(preset("smora", num_experts=12, top_k=3, alpha=5.0), torch.float64)
    layer, x_D, A_RD, B_OR, added_O = rank_by_rank(mixture, 12)
    scores_R = 1 / (1 + (-(layer.router.gate.weight @ x_D)).exp()) + layer.router.bias
    best = eq.largest(scores_R, 3)
    total = sum(scores_R[i] for i in best)
    update_O = sum((scores_R[i] / total * (A_RD[i] @ x_D) * B_OR[:, i] for i in best), torch.zeros(48).double())
    torch.testing.assert_close(added_O, 5.0 * update_O.detach(), rtol=1e-6, atol=1e-6)


def test_flyloras_update_has_the_papers_scale() -> None:
    """(α / r) Σ b_i (a_i x) over the k largest |a_i x + d_i|, r the total rank; the paper's α = 2r doubles."""
    mixture = mixture_of(preset("flylora", num_experts=12, top_k=3, alpha=30.0), torch.float64)
    layer, x_D, A_RD, B_OR, added_O = rank_by_rank(mixture, 12)
    best = eq.largest((A_RD @ x_D + layer.router.bias).abs(), 3)
    update_O = sum(((A_RD[i] @ x_D) * B_OR[:, i] for i in best), torch.zeros(48).double())
    torch.testing.assert_close(added_O, 30.0 / 12 * update_O, rtol=1e-6, atol=1e-6)
    defaults = preset("flylora")
    assert defaults.alpha == 2 * defaults.num_experts == 64


def test_morams_update_has_the_papers_scale() -> None:
    """(α / r) Σ_i w_i b_i (a_i x), w the softmax of the best k of a x / ‖a x‖ over τ, r the task's rank; what is below
    the threshold is left out and the rest keeps its weight."""
    config = preset("moram", targets="all", num_experts=12, top_k=8, temperature=0.5, threshold=0.1, alpha=9.0)
    _, x_D, A_RD, B_OR, added_O = rank_by_rank(mixture_of(config, torch.float64), 12)
    z_R = A_RD @ x_D
    n_R = z_R / (z_R @ z_R) ** 0.5
    strengths = {i: (n_R[i] / 0.5).exp() for i in eq.largest(n_R, 8)}
    kept = {i: w / sum(strengths.values()) for i, w in strengths.items() if n_R[i] >= 0.1}
    assert 0 < len(kept) < 8
    update_O = sum((w * z_R[i] * B_OR[:, i] for i, w in kept.items()), torch.zeros(48).double())
    torch.testing.assert_close(added_O, 9.0 / 12 * update_O, rtol=1e-6, atol=1e-6)


def test_arrow_routes_nobody_to_what_is_not_loaded() -> None:
    """One adapter of four, top 2: it alone serves, at weight 1; a layer it lacks is the base."""
    mixture = molex.convert(tiny("llama"), config_of("arrow", top_k=2))
    there, lacking = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    mixture.load_expert(2, "law", {there: molex.LoRA(torch.randn(3, 32), torch.randn(32, 3), 1.0)})
    mixture.model(**_inputs())
    routing = mixture.state.trace[there].routing
    routing.check()
    assert routing.gates().tolist() == [[0.0, 0.0, 1.0, 0.0]] * len(routing.weights)
    assert float(mixture.state.trace[lacking].routing.gates().abs().sum()) == 0


def test_training_a_router_over_empty_slots_is_told(caplog: pytest.LogCaptureFixture) -> None:
    mixture = molex.convert(tiny("llama"), config_of("meteora", num_experts=3))
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in mixture.layers.items()}
    mixture.set_tasks([0, 1])
    law = {n: molex.LoRA(torch.ones(4, num_in), torch.ones(num_out, 4), 1.0) for n, (num_in, num_out) in shapes.items()}
    mixture.load_expert(1, "law", law)
    mixture.model.eval()(**_inputs())
    assert not caplog.records
    mixture.model.train()
    for _ in range(2):
        mixture.model(**_inputs())
    assert [record.message[:50] for record in caplog.records] == ["experts 0, 2 are frozen and were never loaded, so "]


@pytest.mark.parametrize("name", ["mola", "mixlora", "mos", "hydralora", "poly"])
def test_frozen_experts_are_frozen_everywhere(name: str) -> None:
    mixture = molex.convert(tiny("llama"), config_of(name, train_experts=False))
    trainable = [key for key, p in mixture.model.named_parameters() if p.requires_grad]
    assert all(".router." in key for key in trainable)
    assert bool(trainable) == (name != "mos")


def test_mixdoras_attention_has_dora_too() -> None:
    mixture = molex.convert(tiny("llama"), config_of("mixlora", experts="dora"))
    assert {type(layer.experts) for layer in mixture.layers.values()} == {DoRABank}


def test_a_temperature_is_in_the_logits_that_losses_read() -> None:
    mixture = molex.convert(tiny("llama"), config_of("mola", temperature=5.0))
    mixture.model(**_inputs())
    for decision in mixture.state.trace.values():
        probs_TE, routing = decision.scored().softmax(-1), decision.routing
        chosen_TK = probs_TE.gather(1, routing.expert_ids)
        torch.testing.assert_close(routing.weights, chosen_TK / chosen_TK.sum(-1, keepdim=True))


def test_dynmole_has_one_entropy_index() -> None:
    config = preset("dynmole", entropy_index=1.5)
    assert config.router.entropy_index == config.losses[0].entropy_index == 1.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("lora", "alpha", 0.0), ("mola", "balance_coefficient", -1.0), ("loramoe", "delta", 2.0),
        ("meteora", "task_coefficient", -5.0), ("moram", "threshold", 5.0), ("dynmole", "entropy_coefficient", -1.0),
    ],
)  # fmt: skip
def test_settings_out_of_range(name: str, setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{setting}={value}"):
        preset(name, **{setting: value})


@pytest.mark.parametrize(("name", "setting"), [("smora", "bias_rate"), ("flylora", "bias_rate"), ("mola", "gate_init")])
def test_settings_out_of_a_layers_range(name: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"layers\.0.*{setting}=-1.0"):
        molex.convert(tiny("llama"), config_of(name, **{setting: -1.0}))


# targets, plain targets, experts, rank, alpha, scaling, dropout, top_k, coefficients: the papers', or their code's
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "lora": ("all", "", 1, 8, 16, "alpha/rank", 0.05, None, ()),
    "mixlora": ("ffn", "attention", 8, 16, 32, "alpha/rank", 0.05, 2, (1e-3,)),
    "mola": ("all", "", 5, 8, 16, "alpha/rank", 0.05, 2, (1e-3,)),
    "loramoe": ("ffn", "", 6, 4, 32, "alpha/rank", 0.05, None, (0.1,)),
    "dynmole": ("ffn", "", 6, 24, 48, "alpha/rank", 0.05, None, (1e-2, 1e-3)),
    "smora": ("all", "", 64, 1, 16, "alpha", 0.0, 8, ()),
    "flylora": ("all", "", 32, 1, 64, "alpha/num_experts", 0.0, 8, ()),
    "moram": ("attention", "", 8, 1, 16, "alpha/num_experts", 0.1, 8, ()),
    "meteora": ("all", "", 8, 8, 16, "alpha/rank", 0.0, 2, (50.0,)),
    "xlora": ("all", "", 8, 8, 16, "alpha/rank", 0.0, None, ()),
    "lora-mixer": ("attention", "", 8, 8, 16, "alpha/rank", 0.0, 3, (0.01,)),
    "arrow": ("all", "", 8, 8, 16, "alpha/rank", 0.0, 3, ()),
    "hydralora": ("ffn", "", 4, 4, 32, "alpha/rank", 0.05, None, ()),
    "poly": ("all", "", 4, 8, 1, "alpha/rank", 0.0, None, ()),
    "mhr": ("all", "", 4, 8, 1, "alpha/rank", 0.0, None, ()),
    "mos": ("all", "", 1, 8, 16, "alpha/rank", 0.1, None, ()),
    "mtlora": ("all", "", 5, 8, 16, "alpha/rank", 0.0, None, ()),
}


@pytest.mark.parametrize("name", presets)
def test_defaults_are_the_papers(name: str) -> None:
    c = preset(name)
    coefficients = tuple(v for loss in c.losses for key, v in vars(loss).items() if key.endswith("_coefficient"))
    found = (c.num_experts, c.rank, c.alpha, c.scaling, c.dropout, getattr(c.router, "top_k", None), coefficients)
    assert (" ".join(c.targets), " ".join(c.plain_targets), *found) == DEFAULTS[name]


def test_arrow_loads_its_prototypes_with_its_experts() -> None:
    mixture = molex.convert(tiny("llama"), config_of("arrow"))
    name = "model.layers.0.self_attn.q_proj"
    A_RD, B_OR = torch.randn(3, 32), torch.randn(32, 3)
    mixture.load_expert(2, "law", {name: molex.LoRA(A_RD, B_OR, 1.0)})
    router: Any = mixture.layers[name].router
    top_D = torch.linalg.svd(B_OR @ A_RD).Vh[0]
    assert float((router.prototypes[2] @ top_D).abs()) == pytest.approx(1, abs=1e-5)
    elsewhere: Any = mixture.layers["model.layers.1.self_attn.q_proj"].router
    assert float(elsewhere.prototypes[2].abs().sum()) == 0


def test_tasks_are_asked_for() -> None:
    for name in ("mtlora", "poly", "mhr"):
        mixture = molex.convert(tiny("llama"), config_of(name))
        with pytest.raises(StateError, match="set_tasks"):
            mixture.model(**_inputs())


def test_xloras_head_is_peft_sized_and_alone_trainable() -> None:
    mixture = molex.convert(tiny("llama"), config_of("xlora"))
    head = mixture.model.molex["router"]  # type: ignore[index]
    assert isinstance(head, ScalingsRouter)
    assert {id(p) for p in mixture.trainable_parameters()} == {id(p) for p in head.parameters()}
    kinds = (nn.Linear, nn.ReLU, nn.Dropout, nn.Linear)
    assert all(isinstance(module, kind) for module, kind in zip(head.head, kinds, strict=True))
