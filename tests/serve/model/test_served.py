"""A batch in which every row belongs to another adapter equals each of them alone, by its own library."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import molex
from molex_serve.model import batches
from molex_serve.model.served import ServedModel
from molex_serve.model.step import BASE, Span, Step
from tests.models import VOCABULARY, tiny
from tests.serve.adapters_of import (
    LORAS,
    MIXTURES,
    SHARES,
    TASKS,
    alone,
    save_blend,
    save_everyone,
    save_lora,
    save_mixture,
)

LENGTH = 6
EVERYONE = ("base", *LORAS, "blend", *MIXTURES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_everyone(tmp_path_factory.mktemp("adapters"))


def texts(count: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(3))


def attach(served: ServedModel, folder: Path, names: tuple[str, ...]) -> dict[str, int]:
    read = {name: served.read(str(folder / name), two_passes=True) for name in names if name != "base"}
    return {"base": BASE} | {name: served.attach(adapter) for name, adapter in read.items()}


def logits(served: ServedModel, handles: dict[str, int], rows: list[str], ids: Tensor) -> Tensor:
    """Each row of ids (B, S) by the adapter named for it."""
    spans = [Span(handles[name], i * LENGTH, (i + 1) * LENGTH, TASKS.get(name)) for i, name in enumerate(rows)]
    with torch.no_grad():
        served.begin_step(Step.of(tuple(spans), torch.device("cpu")), lambda stack: stack(ids)[0])
        found = served.model(ids).logits
    served.begin_step(None)
    return found


def check(served: ServedModel, handles: dict[str, int], rows: list[str], folder: Path) -> None:
    ids = texts(len(rows))
    found = logits(served, handles, rows, ids)
    for name, own, ids_S in zip(rows, found, ids, strict=True):
        torch.testing.assert_close(own, alone(name, folder, "llama", ids_S), atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("many", [1, 8, 1000], ids=["one by one", "as it is", "all batched"])
def test_everyone_in_one_batch(folder: Path, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MANY", many)
    served = ServedModel(tiny("llama"))
    handles = attach(served, folder, EVERYONE)
    check(served, handles, [*EVERYONE, *reversed(EVERYONE)], folder)


def test_a_wrong_handle_shows(folder: Path) -> None:
    served = ServedModel(tiny("llama"))
    handles = attach(served, folder, ("base", "law", "code", "mola", "mixlora"))
    swapped = {**handles, "law": handles["code"], "mola": handles["mixlora"]}
    for name in ("law", "mola"):
        with pytest.raises(AssertionError):
            check(served, swapped, ["base", name], folder)


@pytest.mark.parametrize(("first", "then"), [("law", "poem"), ("code", "blend"), ("mola", "mixlora"), ("law", "mola")])
def test_a_step_like_the_last_one_after_adapters_changed(first: str, then: str, folder: Path) -> None:
    served = ServedModel(tiny("llama"))
    handles = attach(served, folder, (first,))
    check(served, {"base": BASE, **handles}, ["base", first], folder)
    check(served, {"base": BASE, **handles}, ["base", first], folder)
    served.detach(handles[first])
    again = attach(served, folder, (then,))
    assert again[then] == handles[first], "the steps' spans are the same"
    check(served, again, ["base", then], folder)


def test_a_step_with_other_tokens_or_another_task_is_planned_anew(folder: Path) -> None:
    served = ServedModel(tiny("llama"))
    handles = attach(served, folder, ("law", "code", "mtlora"))
    for rows in (["law", "code"], ["code", "law"], ["code", "law", "law"], ["mtlora"]):
        check(served, handles, rows, folder)
    (ids,) = texts(1)
    given = [logits_of_task(served, handles["mtlora"], task, ids) for task in (1, 0, 1)]
    assert torch.equal(given[0], given[2])
    assert not torch.allclose(given[0], given[1], atol=1e-3)


def logits_of_task(served: ServedModel, handle: int, task: int, ids: Tensor) -> Tensor:
    with torch.no_grad():
        served.begin_step(Step.of((Span(handle, 0, len(ids), task),), torch.device("cpu")))
        return served.model(ids[None]).logits


def test_tokens_of_the_base_are_the_bases_bit_for_bit(folder: Path) -> None:
    served, plain = ServedModel(tiny("llama")), tiny("llama")
    handles = attach(served, folder, ("base", "law", "mola"))
    ids = texts(4)
    with torch.no_grad():
        wanted = plain(ids).logits
    mixed = logits(served, handles, ["base", "law", "base", "mola"], ids)
    assert torch.equal(mixed[[0, 2]], wanted[[0, 2]])
    assert not torch.equal(mixed[[1, 3]], wanted[[1, 3]])
    assert torch.equal(logits(served, handles, ["base"] * 4, ids), wanted)
    with torch.no_grad():
        assert torch.equal(served.model(ids).logits, wanted), "outside of steps"


def test_detaching_gives_back_memory_and_leaves_the_others(folder: Path) -> None:
    served = ServedModel(tiny("llama"))
    handles = attach(served, folder, ("base", "law", "code", "mola", "poem"))
    free, held = served.pool.num_free(), served.pool.committed_bytes()
    ids, rows = texts(2), ["law", "poem"]
    before = logits(served, handles, rows, ids)
    served.detach(handles["code"])
    served.detach(handles["mola"])
    assert served.pool.num_free() > free
    assert served.pool.committed_bytes() <= held
    torch.testing.assert_close(logits(served, handles, rows, ids), before)
    again = served.attach(served.read(str(folder / "code")))
    check(served, {**handles, "code": again}, ["code", "law", "base", "poem"], folder)
    for handle in (handles["law"], handles["poem"], again):
        served.detach(handle)
    assert served.pool.committed_bytes() == 0


def test_scales_of_half_precise_factors_are_not_rounded(tmp_path: Path) -> None:
    """Over a base in float32, as PEFT has it; a third is no number of bfloat16."""
    for name in SHARES:
        path = save_lora(name, tiny("llama"), tmp_path) / "adapter_model.safetensors"
        save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
        config = json.loads((path.parent / "adapter_config.json").read_text())
        (path.parent / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1.7}))
    save_blend(tmp_path)
    served = ServedModel(tiny("llama"))
    handles = attach(served, tmp_path, ("base", "law", "blend"))
    ids = texts(3)
    found = logits(served, handles, ["law", "base", "blend"], ids)
    for name, own, ids_S in zip(("law", "base", "blend"), found, ids, strict=True):
        torch.testing.assert_close(own, alone(name, tmp_path, "llama", ids_S), atol=2e-5, rtol=1e-4, msg=name)


def test_a_mixture_comes_back_as_it_was(folder: Path) -> None:
    """However often: what stands for its bases does not pile up."""
    served = ServedModel(tiny("llama"))
    mola = served.read(str(folder / "mola"))
    handle = served.attach(mola)
    bases = {name: layer.base.base for name, layer in served.routed[handle].layers.items()}
    served.detach(handle)
    handle = served.attach(mola)
    assert {name: layer.base.base for name, layer in served.routed[handle].layers.items()} == bases
    check(served, {"base": BASE, "mola": handle}, ["base", "mola"], folder)


def test_closing_gives_the_model_back(folder: Path) -> None:
    model = tiny("llama")
    modules, ids = dict(model.named_modules()), texts(1)
    with torch.no_grad():
        wanted = model(ids).logits
    served = ServedModel(model)
    attach(served, folder, ("law", "mixlora", "mola"))
    assert dict(model.named_modules()).keys() != modules.keys()
    served.close()
    assert dict(model.named_modules()) == modules
    assert not [name for name, module in modules.items() if "forward" in vars(module)]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("architecture", ["gpt2", "phi3", "qwen2", "gemma3_text"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    save_lora("code", tiny(architecture), tmp_path)
    for method in ("mola", "mixlora"):
        save_mixture(method, tiny(architecture), tmp_path)
    served, rows = ServedModel(tiny(architecture)), ["mixlora", "base", "code", "mola", "code"]
    handles, ids = attach(served, tmp_path, ("base", "code", "mola", "mixlora")), texts(5)
    for name, own, ids_S in zip(rows, logits(served, handles, rows, ids), ids, strict=True):
        torch.testing.assert_close(own, alone(name, tmp_path, architecture, ids_S), atol=2e-5, rtol=1e-4, msg=name)


def test_who_served_a_token(folder: Path) -> None:
    served, ids = ServedModel(tiny("llama")), texts(1)
    handles = attach(served, folder, ("base", "mola", "law"))
    logits(served, handles, ["mola"], ids)
    found = served.attribution(handles["mola"])
    assert found is not None
    mixture = molex.load(tiny("llama"), folder / "mola")
    with torch.no_grad():
        mixture.model(ids)
    most = len(mixture.experts)
    gates = [d.routing.gates() for d in mixture.state.trace.values() if d.routing.num_experts == most]
    torch.testing.assert_close(found.shares, torch.stack(gates).mean(0))
    assert found.names == mixture.experts
    assert served.attribution(handles["law"]) is None


def test_half_precision(folder: Path) -> None:
    """Routed ones beside their mixture in the same precision: in another one, near ties are decided otherwise."""
    served, ids, rows = ServedModel(tiny("llama").bfloat16()), texts(4), ["code", "mola", "base", "mixlora"]
    handles = attach(served, folder, ("base", "code", "mola", "mixlora"))
    found = logits(served, handles, rows, ids).float()
    for row, name in enumerate(rows):
        if name in MIXTURES:
            mixture = molex.load(tiny("llama").bfloat16(), folder / name)
            with torch.no_grad():
                wanted = mixture.model.eval()(ids).logits[row].float()
        else:
            wanted = alone(name, folder, "llama", ids[row])
        assert (found[row] - wanted).norm() < 0.03 * wanted.norm(), name
