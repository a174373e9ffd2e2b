"""What a forward tells its layers about its tokens: padding, packing, decoding, encoder and decoder, tasks."""

import pytest
import torch
from torch import Tensor, nn

import molex
from molex.errors import ConfigError, StateError
from molex.mixture import Mixture
from molex.routing import RouteContext
from molex.tokens import read_tokens, spread_ids
from tests.models import mixture_of


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
    assert spread_ids(torch.tensor([0, 1, 2, 3]), context, "task ids").tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert spread_ids(torch.tensor([7, 8]), context, "task ids").tolist() == [7] * 6 + [8] * 6
    per_token = torch.arange(12).view(4, 3)
    assert spread_ids(per_token, context, "task ids").tolist() == list(range(12))
    assert spread_ids(per_token, RouteContext(shape=(4, 1)), "task ids").tolist() == [2, 5, 8, 11]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_task_ids_come_to_the_layers_device_and_are_none_on_padding(device: str) -> None:
    """set_tasks([...]) makes them on the CPU, wherever the model and its mask are."""
    state = mixture_of(method="mtlora").state
    state.tasks = torch.tensor([[1, 2, -100]])
    state.stacks["model"] = RouteContext((1, 3), token_mask=torch.tensor([True, True, False], device=device))
    context = state.context("a.layer", "model", torch.zeros(1, 3, 4, device=device), training=False)
    assert context.task_ids is not None
    assert context.task_ids.device.type == device
    if device == "cpu":
        assert context.task_ids.tolist() == [1, 2, 0]


@pytest.mark.parametrize("tasks", [torch.zeros(3), torch.zeros(2, 5), torch.zeros(8), torch.zeros(0)])
def test_task_ids_that_do_not_fit(tasks: Tensor) -> None:
    with pytest.raises(StateError, match="task ids for"):
        spread_ids(tasks, RouteContext(shape=(4, 3)), "task ids")


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


def test_a_plain_module_called_with_anything() -> None:
    model = nn.ModuleList([nn.Linear(4, 4)])
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    mixture = molex.convert(model, molex.preset("mola", targets="0", num_experts=2, rank=2))
    for shape in ((4,), (3, 4), (2, 3, 4), (2, 2, 3, 4), (0, 4)):
        assert model(torch.randn(*shape)).shape == shape
        assert mixture.stats()["0"].tokens == torch.Size(shape[:-1]).numel()
