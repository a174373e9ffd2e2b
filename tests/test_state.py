"""What stays of a forward, and for whom: traces, copies, interleaved models, recomputation, compilation."""

import gc
import weakref
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor

import molex
from molex.errors import StateError
from molex.mixture import Mixture
from molex.routing import RouteContext
from tests.models import SMALL, batch_for, mixture_of, tiny, wake_experts


def contexts(mixture: Mixture) -> list[RouteContext]:
    return [decision.context for decision in mixture.state.trace.values()]


# traces


def test_no_grad_in_training_mode_records_nothing() -> None:
    mixture = mixture_of()
    mixture.model.train()
    ids_BS = torch.full((2, 3), 5)
    mixture.model(ids_BS)
    trace = dict(mixture.state.trace)
    with torch.no_grad():
        mixture.model(torch.full((1, 5), 6))
    assert mixture.state.trace == trace
    mixture.aux_loss().backward()


def test_a_loss_before_any_forward() -> None:
    with pytest.raises(StateError, match="no routing is recorded"):
        mixture_of().aux_loss()


@pytest.mark.parametrize(("name", "method"), [("llama", "mola"), ("llama", "xlora"), ("t5", "mola")])
def test_recording_the_steps_of_generation(name: str, method: str) -> None:
    mixture = mixture_of(name, method)
    with mixture.record() as steps:
        mixture.model.generate(torch.full((2, 3), 5), max_new_tokens=4, do_sample=False, num_beams=2)
    assert len(steps) == 4
    layer = "decoder.block.1.layer.0.SelfAttention.q" if name == "t5" else "model.layers.1.self_attn.q_proj"
    shapes = [step[layer].context.shape for step in steps]
    assert shapes[1:] == [(4, 1)] * 3
    assert mixture.state.steps is None


# copies


@pytest.mark.parametrize("method", ["mola", "mixlora", "xlora", "mos", "moram"])
def test_a_copy_after_a_forward_lives_its_own_life(method: str) -> None:
    model = tiny("llama", num_hidden_layers=8).train()
    batch = batch_for(model)
    small = {} if method in ("mos", "moram") else SMALL
    mixture = molex.convert(model, molex.preset(method, train_experts=True, **small))
    wake_experts(model)
    (model(**batch).loss + mixture.aux_loss()).backward()
    twin = deepcopy(model)
    copy = Mixture.of(twin)
    assert copy is not mixture
    assert copy.model is twin
    assert all(twin.get_submodule(name) is layer for name, layer in copy.layers.items())
    assert {id(layer.state) for layer in copy.layers.values()} == {id(copy.state)}
    model.eval()
    twin.eval()
    expected = model(**batch).logits
    with copy.disabled():
        assert torch.equal(model(**batch).logits, expected)
        assert not torch.equal(twin(**batch).logits, expected)
    assert torch.equal(twin(**batch).logits, expected)
    twin(**batch).loss.backward()
    torch.optim.SGD(copy.trainable_parameters(), lr=1.0).step()
    assert not torch.equal(twin(**batch).logits, expected)
    copy.revert()
    assert not hasattr(twin, "molex_mixture")
    assert torch.equal(twin.requires_grad_(False)(**batch).logits, tiny("llama", num_hidden_layers=8)(**batch).logits)
    assert torch.equal(model(**batch).logits, expected)
    mixture.revert()


def test_two_mixtures_interleaved() -> None:
    ours, theirs = mixture_of(method="mtlora"), mixture_of(method="mtlora")
    short, long = torch.full((1, 2), 5), torch.full((3, 4), 6)
    ours.set_tasks([1])
    theirs.set_tasks([0, 1, 0])
    with torch.no_grad():
        expected = ours.model(short).logits
        ours.model.get_input_embeddings().register_forward_hook(lambda *_: theirs.model(long) and None)
        assert torch.equal(ours.model(short).logits, expected)
    assert contexts(ours)[0].shape == (1, 2)
    assert contexts(theirs)[0].shape == (3, 4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["mola", "mixlora", "xlora", "mtlora"])
def test_a_forwards_tensors_go_with_it(method: str, checkpointing: bool) -> None:
    """Hooks on a tensor keep what they hold as long as it lives, past the garbage collector's sight."""
    mixture = mixture_of(method=method)
    model = mixture.model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mixture.set_tasks([0, 1])

    def step() -> list[weakref.ref[Tensor]]:
        loss = model(**batch_for(model)).loss + mixture.aux_loss()
        loss.backward()
        mixture.step()
        decisions = mixture.state.trace.values()
        return [weakref.ref(t) for d in decisions for t in (d.routing.weights, d.routing.logits) if t is not None]

    earlier = step()
    step()
    gc.collect()
    assert earlier
    assert not any(reference() is not None for reference in earlier)


# checkpointing


def gradients(mixture: Mixture, batch: dict[str, Tensor], between: Callable[[], object]) -> dict[str, Tensor]:
    mixture.model.zero_grad()
    loss = mixture.model(**batch).loss + 10 * mixture.aux_loss()
    between()
    loss.backward()
    return {name: p.grad.clone() for name, p in mixture.model.named_parameters() if p.grad is not None}


CHECKPOINTED = [
    *((name, method) for name in ("llama", "gpt2") for method in ("mola", "mixlora", "mtlora", "lora-mixer", "xlora")),
    *((name, method) for name in ("t5", "bert") for method in ("mola", "mixlora", "mtlora", "lora-mixer")),
    *(("mamba", method) for method in ("mola", "mtlora", "xlora")),
]


@pytest.mark.parametrize(("name", "method"), CHECKPOINTED)
def test_checkpointing_gives_equal_gradients(name: str, method: str) -> None:
    """Also where another forward of the same model (a reference's, no gradients) comes before the backward."""
    mixture = mixture_of(name, method, train_experts=True)
    model = mixture.model.train()
    batch = batch_for(model)
    mixture.set_tasks([0, 1])

    def reference() -> None:
        with torch.no_grad(), mixture.using(tasks=[1]):
            model(**{key: value[:1, :4] for key, value in batch.items()})

    plain = gradients(mixture, batch, lambda: None)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for between in (lambda: None, reference):
        again = gradients(mixture, batch, between)
        assert plain.keys() == again.keys()
        for parameter, gradient in plain.items():
            torch.testing.assert_close(again[parameter], gradient, msg=parameter)


@pytest.mark.parametrize(("name", "method"), CHECKPOINTED)
def test_checkpointing_two_forwards_before_one_backward(name: str, method: str) -> None:
    """Each is recomputed with its own tasks, mask and decisions, not with those of the later one."""
    mixture = mixture_of(name, method, train_experts=True)
    model = mixture.model.train()
    batch = batch_for(model)
    other = {key: value.roll(1, 0) for key, value in batch.items()}
    other["attention_mask"] = torch.ones_like(batch["input_ids"]).index_fill(1, torch.tensor([5, 6]), 0)

    def both() -> dict[str, Tensor]:
        model.zero_grad()
        losses = []
        for tasks, inputs in (([0, 1], batch), ([1, 1], other)):
            with mixture.using(tasks=tasks):
                losses.append(model(**inputs).loss + 10 * mixture.aux_loss())
        sum(losses).backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = both()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter, gradient in both().items():
        torch.testing.assert_close(gradient, plain[parameter], msg=parameter)


@pytest.mark.parametrize("read", ["hidden_states", "aux_loss"])
@pytest.mark.parametrize("method", ["mtlora", "mola", "xlora"])
def test_checkpointing_of_a_loss_on_states_in_between(method: str, read: str) -> None:
    """Neither forward's last output takes part in the loss."""
    mixture = mixture_of(method=method, train_experts=True)
    model = mixture.model.train()
    ids_BS = batch_for(model)["input_ids"]

    def both() -> dict[str, Tensor]:
        model.zero_grad()
        losses = []
        for tasks, inputs in (([0, 1], ids_BS), ([1, 1], ids_BS.roll(1, 0)[:, :5])):
            with mixture.using(tasks=tasks):
                states = model(inputs, output_hidden_states=True).hidden_states
                losses.append(states[1].square().sum() if read == "hidden_states" else 10 * mixture.aux_loss())
        if not sum(losses).requires_grad:
            return {}
        sum(losses).backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = both()
    assert plain or read == "aux_loss"
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = both()
    assert plain.keys() == again.keys()
    for parameter, gradient in plain.items():
        torch.testing.assert_close(again[parameter], gradient, msg=parameter)


@pytest.mark.parametrize("method", ["mola", "mtlora", "mixlora"])
def test_checkpointing_recomputes_the_expert_that_was_asked_for(method: str) -> None:
    """Backward comes after `using` has ended."""
    mixture = mixture_of(method=method)
    model = mixture.model.train()
    batch = batch_for(model)

    def asked() -> dict[str, Tensor]:
        model.zero_grad()
        with mixture.using(adapters=["1", None]):
            loss = model(**batch).loss
        loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = asked()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = asked()
    assert plain.keys() == again.keys()
    for parameter, gradient in plain.items():
        torch.testing.assert_close(again[parameter], gradient, msg=parameter)


@pytest.mark.parametrize("method", ["mola", "mixlora"])
def test_reentrant_checkpointing_is_refused(method: str) -> None:
    mixture = mixture_of(method=method)
    model = mixture.model.train()
    batch = batch_for(model)
    model(**batch).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(StateError, match="use_reentrant"):
        model(**batch).loss.backward()


@pytest.mark.parametrize("method", ["mola", "mixlora"])
def test_one_compiled_graph_holds_the_trace(method: str) -> None:
    mixture = mixture_of(method=method, num_hidden_layers=1)
    batch = batch_for(mixture.model)
    plain = gradients(mixture, batch, lambda: None)
    eager, mixture.model = mixture.model, torch.compile(mixture.model, backend="aot_eager", fullgraph=True)
    eager.zero_grad()
    (mixture.model(**batch).loss + 10 * mixture.aux_loss()).backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(eager.get_parameter(name).grad, gradient, msg=name)
