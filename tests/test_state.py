"""What a forward tells its layers, and what stays from it: masks, tasks, copies, checkpointing, the base alone."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import molex
from molex.errors import ConfigError, StateError
from molex.mixture import Mixture
from molex.routing import RouteContext
from molex.tokens import read_tokens, spread_ids
from tests.models import batch_for, tiny
from tests.test_architectures import wake_experts

SMALL = {"num_experts": 3, "rank": 4, "dropout": 0.0}


def mixture_of(name: str = "llama", method: str = "mola", num_hidden_layers: int = 2, **overrides: object) -> Mixture:
    model = tiny(name, num_hidden_layers=num_hidden_layers)
    mixture = molex.convert(model, molex.preset(method, **{**SMALL, **overrides}))
    wake_experts(model)
    return mixture


def contexts(mixture: Mixture) -> list[RouteContext]:
    return [decision.context for decision in mixture.state.trace.values()]


# masks and segments


def test_a_padding_mask_reaches_every_layer() -> None:
    mixture = mixture_of()
    for mask_BS in (torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])):
        mixture.model(torch.full((2, 4), 5), mask_BS)  # both positional
        assert all(torch.equal(context.token_mask, mask_BS.bool().flatten()) for context in contexts(mixture))
        assert all(stats.tokens == int(mask_BS.sum()) for stats in mixture.stats().values())


def test_statistics_and_losses_do_not_see_padding() -> None:
    """A padded row says the same as the row alone (padding on the right: causal attention never looks at it)."""
    mixture = mixture_of()
    row = torch.tensor([[5, 6, 7]])
    mixture.model(row)
    alone, loss = mixture.stats(), mixture.aux_loss()
    mixture.model(input_ids=torch.tensor([[5, 6, 7, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]]))
    for name, stats in mixture.stats().items():
        assert torch.equal(stats.counts, alone[name].counts)
    torch.testing.assert_close(mixture.aux_loss(), loss)


def test_the_mask_of_cached_decoding_is_that_of_the_new_tokens() -> None:
    mixture = mixture_of()
    mask_BS = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with torch.no_grad():
        first = mixture.model(input_ids=torch.full((2, 3), 5), attention_mask=mask_BS, use_cache=True)
        longer = torch.cat([mask_BS, torch.ones(2, 1, dtype=torch.long)], dim=1)
        mixture.model(torch.full((2, 1), 6), attention_mask=longer, past_key_values=first.past_key_values)
    assert all(context.shape == (2, 1) for context in contexts(mixture))
    assert all(context.token_mask.tolist() == [True, True] for context in contexts(mixture))


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 4, 4), torch.ones(1, 4), torch.ones(2, 3), {"full": None}, None])
def test_masks_that_do_not_say_which_tokens_are_real(mask: object) -> None:
    context = read_tokens({"input_ids": torch.zeros(2, 4), "attention_mask": mask})
    assert context is not None
    assert context.token_mask is None
    assert context.shape == (2, 4)


def test_a_mask_of_pairs_works() -> None:
    mixture = mixture_of()
    mask = torch.zeros(2, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), torch.finfo(torch.float32).min)
    mixture.model(input_ids=torch.full((2, 4), 5), attention_mask=mask)
    assert all(context.token_mask is None for context in contexts(mixture))


def test_packed_positions_become_segments() -> None:
    mixture = mixture_of()
    ids_BS, positions_BS = torch.full((1, 6), 5), torch.tensor([[0, 1, 2, 0, 1, 0]])
    mixture.model(input_ids=ids_BS, position_ids=positions_BS)
    assert all(context.segment_ids.tolist() == [0, 0, 0, 1, 1, 2] for context in contexts(mixture))
    mixture.model(input_ids=ids_BS, position_ids=positions_BS, attention_mask=torch.ones(1, 6))
    assert all(context.segment_ids is None for context in contexts(mixture))


def test_embeddings_and_the_backbone_alone() -> None:
    mixture = mixture_of()
    model, ids_BS = mixture.model, torch.full((2, 3), 5)
    mask_BS = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for call in (
        lambda: model(inputs_embeds=model.get_input_embeddings()(ids_BS), attention_mask=mask_BS),
        lambda: model.model(ids_BS, attention_mask=mask_BS),
    ):
        mixture.state.trace = {}
        call()
        assert len(contexts(mixture)) == len(mixture.layers)
        assert all(context.token_mask.sum() == 5 for context in contexts(mixture))


def test_a_classifier_tells_its_mask() -> None:
    mixture = mixture_of("bert_classifier")
    mixture.model(input_ids=torch.full((2, 3), 5), attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert all(context.token_mask.sum() == 5 for context in contexts(mixture))


def test_an_encoder_decoder_has_two_sets() -> None:
    """Keys and values of cross-attention see the encoder's tokens."""
    mixture = mixture_of("t5")
    mask_BS = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    mixture.model(input_ids=torch.full((2, 4), 5), attention_mask=mask_BS, decoder_input_ids=torch.full((2, 3), 5))
    assert len(mixture.state.trace) == len(mixture.layers)
    for name, decision in mixture.state.trace.items():
        of_encoder = name.startswith("encoder.") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert decision.context.shape == ((2, 4) if of_encoder else (2, 3)), name
        assert (decision.context.token_mask is not None) == of_encoder, name


def test_odd_batches() -> None:
    mixture = mixture_of()
    mixture.model.train()
    for ids_BS, mask_BS in (
        (torch.tensor([[5]]), None),
        (torch.full((2, 3), 5), torch.tensor([[1, 1, 1], [0, 0, 0]])),
        (torch.full((2, 3), 5), torch.zeros(2, 3)),
    ):
        loss = mixture.model(input_ids=ids_BS, attention_mask=mask_BS).logits.sum() + mixture.aux_loss()
        loss.backward()
        mixture.step()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in mixture.trainable_parameters())
        assert all(stats.load.isfinite().all() for stats in mixture.stats().values())


# tasks


def test_task_ids_of_sequences_tokens_and_beams() -> None:
    context = RouteContext(shape=(4, 3))
    assert spread_ids(torch.tensor([0, 1, 2, 3]), context).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert spread_ids(torch.tensor([7, 8]), context).tolist() == [7] * 6 + [8] * 6
    per_token = torch.arange(12).view(4, 3)
    assert spread_ids(per_token, context).tolist() == list(range(12))
    assert spread_ids(per_token, RouteContext(shape=(4, 1))).tolist() == [2, 5, 8, 11]
    padded = RouteContext(shape=(1, 3), token_mask=torch.tensor([True, True, False]))
    assert spread_ids(torch.tensor([[1, 2, -100]]), padded).tolist() == [1, 2, 0]


@pytest.mark.parametrize("tasks", [torch.zeros(3), torch.zeros(2, 5), torch.zeros(8), torch.zeros(0)])
def test_task_ids_that_do_not_fit(tasks: Tensor) -> None:
    with pytest.raises(StateError, match="task ids for"):
        spread_ids(tasks, RouteContext(shape=(4, 3)))


def test_task_ids_of_no_shape() -> None:
    with pytest.raises(ConfigError, match=r"one task id for each sequence"):
        mixture_of().set_tasks(1)  # type: ignore[arg-type]


def test_tasks_stay_until_changed() -> None:
    mixture = mixture_of(method="mtlora")
    model, ids_BS = mixture.model, torch.full((2, 3), 5)
    with pytest.raises(StateError, match=r"mixture\.set_tasks\(ids\)"):
        model(ids_BS)
    mixture.set_tasks([0, 1])
    with torch.no_grad():
        both = model(ids_BS).logits
        assert torch.equal(model(ids_BS).logits, both)
        with mixture.using(tasks=[1, 1]):
            inside = model(ids_BS).logits
            assert not torch.equal(inside[0], both[0])
            torch.testing.assert_close(inside[1], both[1])
        assert torch.equal(model(ids_BS).logits, both)
        mixture.set_tasks([[0, 0, 0], [1, 1, 1]])
        assert torch.equal(model(ids_BS).logits, both)
        mixture.set_tasks([0, 1])
        beams = model.generate(ids_BS, max_new_tokens=3, num_beams=2, do_sample=False)
        for row in range(2):
            with mixture.using(tasks=[row]):
                alone = model.generate(ids_BS[row : row + 1], max_new_tokens=3, num_beams=2, do_sample=False)
            assert torch.equal(beams[row : row + 1], alone)
    mixture.set_tasks(None)
    with pytest.raises(StateError):
        model(ids_BS)


# one expert for each sequence, and the base alone


@pytest.mark.parametrize("method", ["mola", "mixlora", "hydralora", "poly", "mhr", "lora-mixer", "arrow", "dynmole"])
def test_each_sequence_under_an_expert_of_its_own(method: str) -> None:
    mixture = mixture_of(method=method, **({"top_k": 2} if method in ("lora-mixer", "arrow") else {}))
    model, ids_BS = mixture.model, torch.arange(3, 11).view(2, 4).repeat(2, 1)
    with torch.no_grad():
        with mixture.using(adapters=["2", None, "0", "1"]):
            mixed = model(ids_BS).logits
        with mixture.disabled():
            base = model(ids_BS).logits
        torch.testing.assert_close(mixed[1], base[1])
        with mixture.using(adapters=[None] * 4):
            assert torch.equal(model(ids_BS).logits, base)
        for row, name in ((0, "2"), (2, "0"), (3, "1")):
            with mixture.using(adapters=name):
                alone = model(ids_BS[row : row + 1]).logits
            torch.testing.assert_close(mixed[row : row + 1], alone)
            assert not torch.allclose(mixed[row], base[row])


@pytest.mark.parametrize("method", ["mola", "mixlora"])
def test_one_expert_is_its_weights_added_to_the_base(method: str) -> None:
    mixture = mixture_of(method=method)
    ids_BS = batch_for(mixture.model)["input_ids"]
    merged = tiny("llama")
    with torch.no_grad():
        for name, layer in mixture.layers.items():
            expert_id = 2 if layer.experts.num_experts > 1 else 0
            merged.get_submodule(name).weight += layer.experts.materialize(expert_id)
        with mixture.using(adapters="2"):
            torch.testing.assert_close(mixture.model(ids_BS).logits, merged(ids_BS).logits)


def test_an_expert_that_is_not_there() -> None:
    mixture = mixture_of()
    with pytest.raises(ConfigError, match=r"no expert 'law'; this mixture has: 0, 1, 2"), mixture.using(adapters="law"):
        pass
    layered = mixture_of(allocation=(2, 3))
    with pytest.raises(ConfigError, match=r"layers\.0\.\S* has no expert '2', only 2"), layered.using(adapters="2"):
        pass
    assert mixture.state.request is None
    with mixture.using(adapters=["0", "1"]), pytest.raises(StateError, match="adapters for 2 sequences"):
        mixture.model(torch.full((3, 2), 5))


@pytest.mark.parametrize("method", ["mola", "mixlora", "xlora", "smora", "mos"])
def test_disabled_is_the_base_bit_for_bit(method: str) -> None:
    model = tiny("llama", num_hidden_layers=8).requires_grad_(False)
    batch = batch_for(model)
    base = model(**batch).logits
    small = {} if method in ("smora", "mos") else SMALL
    mixture = molex.convert(model, molex.preset(method, **small))
    with torch.no_grad():
        for parameter in mixture.trainable_parameters():
            parameter.normal_(std=0.1)
    wake_experts(model)
    for training in (False, True):
        model.train(training)
        loss = model(**batch).loss
        trace = mixture.state.trace
        with mixture.disabled(), torch.no_grad():
            assert torch.equal(model(**batch).logits, base)
        assert mixture.state.trace is trace
        assert trace
        assert not torch.equal(model(**batch).logits, base)
        (loss + mixture.aux_loss()).backward()


def test_plain_loras_are_no_experts_of_the_mixture() -> None:
    """MixLoRA's attention: left alone when an expert is loaded, and out of the statistics."""
    mixture = mixture_of(method="mixlora")
    plain = {name: layer.experts.lora_B.clone() for name, layer in mixture.layers.items() if "attn" in name}
    routed = {name: layer for name, layer in mixture.layers.items() if name not in plain}
    factors = {name: (torch.ones(4, x.in_features), torch.ones(x.out_features, 4)) for name, x in routed.items()}
    mixture.load_expert(2, "law", factors, 1.0)
    assert mixture.experts == ["0", "1", "law"]
    assert all(torch.equal(mixture.layers[name].experts.lora_B, B) for name, B in plain.items())
    mixture.model(torch.full((2, 3), 5))
    assert set(mixture.stats()) < set(routed)
    with pytest.raises(ConfigError, match="expert 3 of a bank of 3"):
        mixture.load_expert(3, "art", {}, 1.0)


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


# balance biases, empty experts


def test_biases_move_only_in_step() -> None:
    mixture = mixture_of(method="smora", num_experts=8, top_k=2, rank=1)
    model = mixture.model.train()
    batch = batch_for(model)
    biases = {name: layer.router.bias.clone() for name, layer in mixture.layers.items()}
    model(**batch).loss.backward()
    assert all(torch.equal(mixture.layers[name].router.bias, bias) for name, bias in biases.items())
    mixture.step()
    assert not any(torch.equal(mixture.layers[name].router.bias, bias) for name, bias in biases.items())


@pytest.mark.parametrize("method", ["mola", "mixlora"])
@pytest.mark.parametrize("backend", ["reference", "dense", "grouped"])
def test_experts_that_nobody_chose(method: str, backend: str) -> None:
    mixture = mixture_of(method=method, top_k=1, rank=8, backend=backend)
    with torch.no_grad():
        for layer in mixture.layers.values():
            if layer.router is not None:
                for parameter in layer.router.parameters():
                    parameter.zero_()  # ties: every token to one expert
    model = mixture.model.train()
    (model(**batch_for(model)).loss + mixture.aux_loss()).backward()
    routed = [stats for stats in mixture.stats().values() if len(stats.counts) > 1]
    assert all(len(stats.dead) == 2 and stats.entropy == 0 for stats in routed)
    assert all(p.grad.isfinite().all() for p in mixture.trainable_parameters())


def test_a_plain_module_called_with_anything() -> None:
    model = nn.ModuleList([nn.Linear(4, 4)])
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    mixture = molex.convert(model, molex.preset("mola", targets="0", num_experts=2, rank=2))
    for shape in ((4,), (3, 4), (2, 3, 4), (2, 2, 3, 4), (0, 4)):
        assert model(torch.randn(*shape)).shape == shape
        assert mixture.stats()["0"].tokens == torch.Size(shape[:-1]).numel()
