"""Over a mixture-of-experts base: expert swaps, LoRAs, a routed mixture and the base in one batch."""

import copy
from pathlib import Path

import peft
import pytest
import torch

import molex
from molex_serve.errors import BadAdapter
from molex_serve.model.served import ServedModel
from molex_serve.model.step import BASE, Span, Step
from molex_serve.settings import AdapterLimits
from tests.esft.models import moe, tokens
from tests.models import tiny, wake_experts
from tests.serve.adapters_of import fill
from tests.serve.expert_swaps import merged, save_swap

ATTENTION = ("q_proj", "v_proj")


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_every_kind_at_once(architecture: str, tmp_path: Path) -> None:
    model = moe(architecture)
    swap = save_swap("law", model, tmp_path)
    lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=[*ATTENTION]))
    fill(lora, "lora_B", "lora")
    lora.save_pretrained(str(tmp_path / "lora"))
    mixed = copy.deepcopy(model)
    settings = {"targets": ATTENTION, "num_experts": 3, "rank": 2, "allocation": None}
    mixture = molex.convert(mixed, molex.preset("mola", **settings))
    wake_experts(mixed)
    mixture.save(tmp_path / "mola")
    alone = {
        "base": copy.deepcopy(model),
        "swap": merged(copy.deepcopy(model), swap),
        "lora": lora.merge_and_unload(),
        "mola": mixed,
    }
    served = ServedModel(model, AdapterLimits(resident=4))
    handles = {"base": BASE} | {
        name: served.attach(served.read(str(path)))
        for name, path in {"swap": swap, "lora": tmp_path / "lora", "mola": tmp_path / "mola"}.items()
    }
    assert len(set(handles.values())) == 4
    rows = ["lora", "swap", "base", "mola", "swap", "base"]
    ids = tokens(len(rows), 5)
    spans = tuple(Span(handles[name], 5 * i, 5 * i + 5) for i, name in enumerate(rows))
    served.begin_step(Step.of(spans, torch.device("cpu")))
    with torch.no_grad():
        found = model(ids).logits
        for name, own, ids_S in zip(rows, found, ids, strict=True):
            torch.testing.assert_close(own, alone[name].eval()(ids_S[None]).logits[0], atol=2e-5, rtol=1e-4, msg=name)
        served.detach(handles["swap"])
        served.begin_step(Step.of((Span(handles["swap"], 0, 5),), torch.device("cpu")))
        torch.testing.assert_close(model(ids[:1]).logits, alone["base"](ids[:1]).logits)
        served.close()
        assert torch.equal(model(ids).logits, alone["base"](ids).logits)


def test_over_a_dense_base_they_are_refused(tmp_path: Path) -> None:
    swap = save_swap("law", moe("mixtral"), tmp_path)
    with pytest.raises(BadAdapter, match="experts"):
        ServedModel(tiny("llama")).read(str(swap))
    without = ServedModel(moe("mixtral"), AdapterLimits(expert_slots=0))
    with pytest.raises(BadAdapter, match="is of kind 'esft'"):
        without.attach(without.read(str(swap)))
