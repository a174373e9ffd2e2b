"""Feed-forward modules that compute at once: the same as their layers one by one, and only where nobody minds."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

import molex
from molex.gated import GatedForward
from molex.kernels.block import Block
from molex.kernels.dense import Dense
from tests.models import tiny

IDS = torch.arange(12).view(2, 6)
JOINED = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "granite"]
NOT_JOINED = ["phi3", "gpt2", "gpt_neox", "opt"]  # a fused gate and up; no gate


@pytest.fixture(autouse=True)
def blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones are otherwise computed as streams, which `test_backends` and `test_ffn` are for."""
    monkeypatch.setattr("molex.kernels.dense.WORTH", 0)


def mixture_of(architecture: str, **overrides: object) -> tuple[nn.Module, molex.Mixture]:
    model = tiny(architecture)
    settings = {"num_experts": 4, "rank": 4, "dropout": 0.0, **overrides}
    mixture = molex.convert(model, molex.preset("mixlora", **settings))
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_B", "lora_m")):
            nn.init.normal_(parameter, std=0.3)
    return model, mixture


@contextmanager
def counted() -> Iterator[list[str]]:
    """The activations of the blocks that were computed at once."""
    calls: list[str] = []
    ffn = Dense.ffn

    def counting(self: Dense, x: Tensor, block: Block) -> Tensor:
        calls.append(block.activation)
        return ffn(self, x, block)

    with patch.object(Dense, "ffn", counting):
        yield calls


def blocks(model: nn.Module) -> list[GatedForward]:
    found = [vars(module).get("forward") for module in model.modules()]
    return [forward for forward in found if isinstance(forward, GatedForward)]


def loss_and_gradients(model: nn.Module, mixture: molex.Mixture) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(IDS, labels=IDS).loss + mixture.aux_loss()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("architecture", JOINED)
def test_a_block_at_once_is_its_layers_one_by_one(architecture: str, top_k: int) -> None:
    model, mixture = mixture_of(architecture, top_k=top_k)
    assert len(blocks(model)) == 2
    with counted() as calls:
        at_once = loss_and_gradients(model, mixture)
    assert len(calls) == 2
    assert set(calls) == {"gelu_tanh" if architecture.startswith("gemma") else "silu"}
    for forward in blocks(model):
        forward.remove()
    with counted() as calls:
        one_by_one = loss_and_gradients(model, mixture)
    assert not calls
    assert at_once.keys() == one_by_one.keys()
    for name, value in one_by_one.items():
        torch.testing.assert_close(
            at_once[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("architecture", NOT_JOINED)
def test_another_kind_of_block_is_left_as_it_is(architecture: str) -> None:
    model, mixture = mixture_of(architecture)
    assert not blocks(model)
    assert loss_and_gradients(model, mixture)["loss"].isfinite()


def test_a_forward_that_does_more_is_left_as_it_is() -> None:
    class Louder(nn.Module):
        def __init__(self, mlp: nn.Module):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
                mlp.gate_proj,
                mlp.up_proj,
                mlp.down_proj,
                mlp.act_fn,
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * (2 * self.up_proj(x)))

    model = tiny("llama", num_hidden_layers=1)
    model.model.layers[0].mlp = Louder(model.model.layers[0].mlp)
    expected = model(IDS).logits
    molex.convert(model, molex.preset("mixlora", num_experts=4, rank=4))
    assert not blocks(model)
    assert torch.equal(model(IDS).logits, expected)


def test_a_model_without_memory_is_joined_too() -> None:
    with torch.device("meta"):
        model, _ = mixture_of("llama")
    assert len(blocks(model)) == 2


def test_dora_experts_run_layer_by_layer() -> None:
    model, mixture = mixture_of("llama", experts="dora")
    assert not blocks(model)
    assert loss_and_gradients(model, mixture)["loss"].isfinite()


def test_a_hook_on_a_layer_is_called() -> None:
    model, _ = mixture_of("llama")
    expected, seen = model(IDS).logits, []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with counted() as calls:
        torch.testing.assert_close(model(IDS).logits, expected)
    assert len(calls) == 1
    assert len(seen) == 1
    handle.remove()
    with counted() as calls:
        model(IDS)
    assert len(calls) == 2


def test_a_forward_someone_put_in_the_activation_is_called() -> None:
    model, _ = mixture_of("llama")
    mlp = model.model.layers[0].mlp
    before = model(IDS).logits
    mlp.act_fn.forward = torch.zeros_like
    assert not torch.allclose(model(IDS).logits, before)


def test_under_autocast_layers_run_one_by_one() -> None:
    model, _ = mixture_of("llama")
    with counted() as calls, torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(IDS).logits.isfinite().all()
    assert not calls


def test_the_base_alone() -> None:
    model, mixture = mixture_of("llama")
    with counted() as calls, mixture.disabled():
        torch.testing.assert_close(model(IDS).logits, tiny("llama")(IDS).logits, rtol=0, atol=0)
    assert not calls


def test_new_experts_leave_the_base_bit_for_bit() -> None:
    model = tiny("llama")
    expected = model(IDS).logits
    molex.convert(model, molex.preset("mixlora", num_experts=4, rank=4))
    with counted() as calls:
        assert torch.equal(model(IDS).logits, expected)
    assert calls


def test_a_copy_computes_with_its_own_layers_and_reverts_alone() -> None:
    model, _ = mixture_of("llama")
    expected = model(IDS).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.down_proj.experts.lora_B.mul_(3)
    assert torch.equal(model(IDS).logits, expected)
    assert not torch.allclose(twin(IDS).logits, expected)
    reverted = molex.Mixture.of(twin).revert()
    assert not blocks(reverted)
    assert torch.equal(reverted(IDS).logits, tiny("llama")(IDS).logits)
    assert len(blocks(model)) == 2
    assert torch.equal(model(IDS).logits, expected)


def test_dropout_drops_in_training_alone_and_keeps_the_mean() -> None:
    model, mixture = mixture_of("llama", dropout=0.5)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 6, 32)
    mixture.state.stacks.clear()
    certain = mlp(x)
    for experts in (mlp.gate_proj.experts, mlp.up_proj.experts):
        experts.dropout.p = 0.0  # the down projection's alone is linear, so its mean is what evaluation gives
    mlp.train()
    with counted() as calls:
        draws = torch.stack([mlp(x) for _ in range(4000)])
    assert len(calls) == 4000
    assert float(draws.std(0).mean()) > 0.01
    spread = draws.std(0) / len(draws) ** 0.5
    assert float(((draws.mean(0) - certain).abs() / spread.clamp(min=1e-9)).max()) < 5
    assert loss_and_gradients(model.train(), mixture)["loss"].isfinite()


def test_checkpointed_recomputation_gives_the_same_gradients() -> None:
    model, mixture = mixture_of("llama", dropout=0.3)
    model.train()
    torch.manual_seed(0)
    expected = loss_and_gradients(model, mixture)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    with counted() as calls:
        got = loss_and_gradients(model, mixture)
    assert len(calls) == 4
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("activation", ["relu6", "gelu_10"])
def test_an_activation_that_is_cut_off_far_away_is_another_one(activation: str) -> None:
    model = tiny("llama", hidden_act=activation)
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.mlp.gate_proj.weight.mul_(300)  # type: ignore[union-attr, operator]
    expected = model(IDS).logits
    molex.convert(model, molex.preset("mixlora", num_experts=4, rank=4))
    assert torch.equal(model(IDS).logits, expected)


def test_a_layer_that_someone_put_there_later_is_called() -> None:
    model, _ = mixture_of("llama")
    mlp, seen = model.model.layers[0].mlp, []

    class Watching(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.shape)
            return self.inner(x)

    expected = model(IDS).logits
    mlp.down_proj = Watching(mlp.down_proj)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert seen


def test_others_run_their_models_while_one_is_converted() -> None:
    """A server loads a mixture while its engine computes: looking at a block must not touch modules elsewhere."""
    found: list[Tensor] = []

    model = tiny("llama")
    other, x = nn.Linear(4, 4), torch.ones(1, 4)

    def forward(self: nn.Module, hidden: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: found.append(other(x)))
        thread.start()
        thread.join()
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))

    with patch.object(LlamaMLP, "forward", forward):
        molex.convert(model, molex.preset("mixlora", num_experts=4, rank=4))
        assert len(blocks(model)) == 2
    assert len(found) == 2
    assert torch.equal(found[0], other(x))
