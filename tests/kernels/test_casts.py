"""Kept casts are the factors as they are now, whatever way they were changed, and cost nothing where not needed."""

import copy
import io
from collections.abc import Callable
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

import molex
from molex import LoRA
from molex.experts import LayerShape
from molex.experts.lora import LoRABank
from molex.kernels import Columns
from molex.kernels.casts import KV_CACHES, Casts
from tests.models import mixture_of

NARROW = torch.bfloat16


class Cache:
    """Stands for a KV cache."""


def bank_of(num_experts: int = 3, dtype: torch.dtype = torch.float32) -> LoRABank:
    torch.manual_seed(0)
    ranks = (2,) * num_experts
    shape = LayerShape("q", nn.Linear(6, 5), 6, 5, ranks, (1.0,) * num_experts, 0.0, torch.device("cpu"), dtype)
    bank = LoRABank(shape)
    nn.init.normal_(bank.lora_B)
    return bank


def continued(bank: LoRABank) -> Cache:
    """The bank's model has read a prompt and goes on."""
    cache = Cache()
    bank.casts.begin({"past_key_values": cache})
    bank.casts.begin({"past_key_values": cache})
    return cache


def now(bank: LoRABank) -> Columns:
    return bank.casts.columns([*bank.parameters(recurse=False)], NARROW, bank.columns)


def assert_current(bank: LoRABank) -> None:
    kept, true = now(bank), bank.columns()
    assert torch.equal(kept.A, true.A.to(NARROW))
    assert torch.equal(kept.B, true.B.to(NARROW))
    assert kept.ranks == true.ranks
    assert torch.equal(kept.expert_of_column, true.expert_of_column)


@torch.no_grad()
def test_a_continued_text_reads_the_same_tensors() -> None:
    bank = bank_of()
    cache = continued(bank)
    first = now(bank)
    bank.casts.begin({"past_key_values": cache})
    assert now(bank) is first
    assert_current(bank)


def stepped(**settings: bool) -> Callable[[LoRABank], None]:
    def change(bank: LoRABank) -> None:
        optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, **settings)
        with torch.enable_grad():
            (bank.lora_A.square().sum() + bank.lora_B.square().sum()).backward()
        optimizer.step()

    return change


def written(bank: LoRABank) -> None:
    bank.lora_B.mul_(2)


def written_in_inference_mode(bank: LoRABank) -> None:
    with torch.inference_mode():
        bank.lora_A[1] += 1


def given_other_data(bank: LoRABank) -> None:
    bank.lora_A.data = bank.lora_A.data + 1


def replaced(bank: LoRABank) -> None:
    bank.lora_A = nn.Parameter(bank.lora_A + 1)


def deleted_and_replaced(bank: LoRABank) -> None:
    """The new parameter may get the old one's address."""
    shape = bank.lora_B.shape
    del bank.lora_B
    bank.lora_B = nn.Parameter(torch.ones(shape))


def replaced_over_the_same_memory(bank: LoRABank) -> None:
    """Written as often as the old one was."""
    version = bank.lora_B._version
    bank.lora_B = nn.Parameter(bank.lora_B.data)
    while bank.lora_B._version < version:
        bank.lora_B.add_(1)


def swapped(bank: LoRABank) -> None:
    torch.utils.swap_tensors(bank.lora_A, nn.Parameter(bank.lora_A + 1))


def loaded(bank: LoRABank) -> None:
    bank.load_expert(1, "one", LoRA(torch.ones(2, 6), torch.ones(5, 2), 2.0))


def state_loaded(bank: LoRABank, assign: bool = False) -> None:
    bank.load_state_dict({name: 2 * tensor for name, tensor in bank.state_dict().items()}, assign=assign)


def state_assigned(bank: LoRABank) -> None:
    state_loaded(bank, assign=True)


def appended(bank: LoRABank) -> None:
    bank.append(3)
    bank.lora_B.add_(1)


def grown(bank: LoRABank) -> None:
    bank.grow((2, 1), 1.0)
    bank.lora_B.add_(1)


def cast(bank: LoRABank) -> None:
    bank.to(torch.float64).lora_A.add_(1)


CHANGES = [
    *(stepped(foreach=False), stepped(foreach=True)),
    *(written, written_in_inference_mode, given_other_data, swapped),
    *(replaced, deleted_and_replaced, replaced_over_the_same_memory),
    *(loaded, state_loaded, state_assigned, LoRABank.reset_A, appended, grown, cast),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_changed_is_cast_anew(change: Callable[[LoRABank], None]) -> None:
    bank = bank_of()
    continued(bank)
    before = now(bank)
    change(bank)
    after = now(bank)
    assert not (torch.equal(after.A, before.A) and torch.equal(after.B, before.B)), "nothing was changed"
    assert_current(bank)
    assert now(bank) is now(bank)


@torch.no_grad()
def test_either_stack_of_a_grown_bank_may_change() -> None:
    bank = bank_of()
    bank.grow((2,), 1.0)
    continued(bank)
    for parameter in bank.parameters():
        kept = now(bank)
        parameter.add_(1)
        assert now(bank) is not kept
        assert_current(bank)


def with_another_cache(casts: Casts, arguments: dict[str, Cache]) -> None:
    casts.begin({name: Cache() for name in arguments})


def with_a_prompt(casts: Casts, arguments: dict[str, Cache]) -> None:
    """A cache that was emptied, and is filled anew."""
    casts.begin({**arguments, "input_ids": torch.zeros(1, 3, dtype=torch.int64)})


def with_no_cache(casts: Casts, arguments: dict[str, Cache]) -> None:
    casts.begin({})


def with_gradients(casts: Casts, arguments: dict[str, Cache]) -> None:
    with torch.enable_grad():
        casts.begin(arguments)


@pytest.mark.parametrize("name", KV_CACHES)
@pytest.mark.parametrize("begin", [with_another_cache, with_a_prompt, with_no_cache, with_gradients])
@torch.no_grad()
def test_writes_that_autograd_does_not_count_are_seen_by_the_next_text(
    begin: Callable[[Casts, dict[str, Cache]], None], name: str
) -> None:
    bank, arguments = bank_of(), {name: Cache()}
    for _ in range(2):
        bank.casts.begin(arguments)
    kept = ref(now(bank).A)
    bank.lora_A.data.add_(1)
    bank.lora_B.numpy()[:] = 3
    begin(bank.casts, arguments)
    assert kept() is None, "what is not needed takes memory"
    assert_current(bank)


@torch.no_grad()
def test_the_first_call_with_a_cache_keeps_already() -> None:
    """Its casts serve the step after it."""
    bank = bank_of()
    cache = Cache()
    bank.casts.begin({"past_key_values": cache})
    first = now(bank)
    bank.casts.begin({"past_key_values": cache})
    assert now(bank) is first


@torch.no_grad()
def test_caches_of_tuples_do_not_tell_texts_apart() -> None:
    bank, cache = bank_of(), ((torch.zeros(1), torch.zeros(1)),)
    for _ in range(3):
        bank.casts.begin({"past_key_values": cache})
        bank.lora_A.data.add_(1)
        assert_current(bank)


@torch.no_grad()
def test_a_call_that_another_thread_overtakes_leaves_nothing_behind() -> None:
    """While it casts, the factors are written uncounted and the next text begins."""
    bank = bank_of()
    continued(bank)
    next_cache = Cache()

    def overtaken() -> Columns:
        old = bank.columns().to(torch.float64)
        bank.lora_A.data.add_(1)
        bank.casts.begin({"past_key_values": next_cache})
        return old

    bank.casts.columns([*bank.parameters(recurse=False)], NARROW, overtaken)
    assert_current(bank)


def test_a_fused_optimizer_counts_nothing_and_is_seen() -> None:
    bank = bank_of()
    cache, version = continued(bank), bank.lora_A._version
    with torch.no_grad():
        before = now(bank)
    bank.casts.begin({"past_key_values": cache})  # the training step's own forward
    stepped(fused=True)(bank)
    assert bank.lora_A._version == version
    with torch.no_grad():
        bank.casts.begin({"past_key_values": cache})
        assert not torch.equal(now(bank).A, before.A)
        assert_current(bank)


def test_gradients_flow_past_what_is_kept() -> None:
    bank = bank_of()
    continued(bank)
    with torch.no_grad():
        now(bank)
    now(bank).A.sum().backward()
    assert bank.lora_A.grad is not None


def in_inference_mode(monkeypatch: pytest.MonkeyPatch, bank: LoRABank) -> None:
    with torch.inference_mode():
        bank.lora_A = nn.Parameter(bank.lora_A.clone())


def distributed(monkeypatch: pytest.MonkeyPatch, bank: LoRABank) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


def traced(monkeypatch: pytest.MonkeyPatch, bank: LoRABank) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("setting", [in_inference_mode, distributed, traced])
@torch.no_grad()
def test_where_writes_are_not_counted_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, setting: Callable[[pytest.MonkeyPatch, LoRABank], None]
) -> None:
    bank = bank_of()
    setting(monkeypatch, bank)
    continued(bank)
    with torch.inference_mode():
        assert now(bank).A is not now(bank).A
        bank.lora_A.data.add_(1)
        assert_current(bank)


@torch.no_grad()
def test_equal_dtypes_cost_no_memory() -> None:
    bank = bank_of(dtype=NARROW)
    continued(bank)
    assert now(bank).A is bank.lora_A
    assert now(bank).B is bank.lora_B
    bank.grow((2,), 1.0)
    assert now(bank).A is not now(bank).A


@torch.no_grad()
def test_copies_have_none_of_it() -> None:
    bank = bank_of()
    cache = continued(bank)
    kept = now(bank)
    twin = copy.deepcopy(bank)
    file = io.BytesIO()
    torch.save(bank, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        other.casts.begin({"past_key_values": cache})
        other.lora_A.data.add_(1)
        assert_current(other)
    assert now(bank) is kept


def every_column(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a layer's factors are put together."""
    calls, made = [], LoRABank.columns

    def counted(bank: LoRABank) -> Columns:
        calls.append(len(bank.ranks))
        return made(bank)

    monkeypatch.setattr(LoRABank, "columns", counted)
    return calls


def generated(model: nn.Module, ids: Tensor) -> Tensor:
    return model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)


@pytest.mark.parametrize("method", ["mola", "mixlora"])
def test_a_generation_casts_once(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    mixture = mixture_of("llama", method)
    model = mixture.model.to(NARROW)
    for layer in mixture.layers.values():
        layer.experts.float()
    ids, calls = torch.tensor([[3, 4, 5]]), every_column(monkeypatch)
    generated(model, ids)
    assert len(calls) == len(mixture.layers)


def test_training_between_generations_is_seen() -> None:
    mixture = mixture_of("llama", "mola")
    model = mixture.model.to(NARROW)
    for layer in mixture.layers.values():
        layer.experts.float()
    ids = torch.tensor([[3, 4, 5]])
    before = generated(model, ids)
    for parameter in mixture.trainable_parameters():
        parameter.data.mul_(3)
    after, expected = generated(model, ids), generated(copy.deepcopy(model), ids)
    assert torch.equal(torch.stack(after.logits), torch.stack(expected.logits))
    assert not torch.equal(after.logits[0], before.logits[0])


def test_a_copied_model_has_one_object_for_all_its_layers() -> None:
    mixture = molex.Mixture.of(copy.deepcopy(mixture_of("llama", "mola").model))
    assert {id(layer.experts.casts) for layer in mixture.layers.values()} == {id(mixture.state.casts)}
    assert isinstance(mixture.state.casts, Casts)
