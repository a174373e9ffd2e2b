"""molex.merge into a model, a streamed checkpoint and one adapter: against dense arithmetic, PEFT and transformers."""

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from molex.errors import CheckpointError, ConfigError, MolexError, StateError, TargetError
from molex.experts import LoRA
from molex.io.adapter import Adapter
from molex.io.peft import read_adapter, write_adapter
from molex.io.stream import Entry, read_slots, write_stream
from molex.merging import checkpoint, merge
from tests.merging.adapters import adapter_for, saved_base
from tests.merging.loras import dense
from tests.models import batch_for, mixture_of, tiny

ENDS = {
    "llama": ("q_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj"),
    "gpt_neox": ("dense",),
    "opt": ("fc1", "q_proj"),
}


def pair(model, kind: str) -> dict[str, Adapter]:
    return {"x": adapter_for(model, ENDS[kind]), "y": adapter_for(model, ENDS[kind][:1], rank=2, seed=1)}


def merged_weights(model, adapters: dict[str, Adapter], weights: list[float]) -> dict[str, torch.Tensor]:
    """Each parameter plus Σ w s B A, dense, float64."""
    expected = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    for adapter, weight in zip(adapters.values(), weights, strict=True):
        for layer, lora in adapter.factors.items():
            update = weight * dense(lora)
            is_conv = type(model.get_submodule(layer)).__name__ == "Conv1D"
            expected[f"{layer}.weight"] = expected[f"{layer}.weight"] + (update.T if is_conv else update)
    return expected


@pytest.mark.parametrize("kind", ENDS)
def test_into_a_model(kind: str) -> None:
    model = tiny(kind)
    adapters = pair(model, kind)
    expected = merged_weights(model, adapters, [0.5, 2.0])
    assert merge(model, adapters, weights=[0.5, 2.0]) is model
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("shard_size", ["5GB", 20_000])
def test_into_a_checkpoint(kind: str, shard_size: str | int, tmp_path: Path) -> None:
    base, out = saved_base(tmp_path / "base", kind), tmp_path / "out"
    model = tiny(kind)
    adapters = pair(model, kind)
    merge(base, adapters, weights=[0.5, 2.0], out=out, shard_size=shard_size)
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = merged_weights(model, adapters, [0.5, 2.0])
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "tokenizer.json").is_file()
    shards = sorted(out.glob("*.safetensors"))
    if shard_size == 20_000:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert {path.name for path in shards} == set(index["weight_map"].values())
        assert index["metadata"]["total_size"] == sum(t.nbytes for p in shards for t in load_file(p).values())
        assert all(len(load_file(p)) == 1 or p.stat().st_size < 25_000 for p in shards)
    else:
        assert [path.name for path in shards] == ["model.safetensors"]


def test_equals_pefts_own_merge(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    adapter = adapter_for(tiny("llama"), ("q_proj", "up_proj"))
    write_adapter(adapter, tmp_path / "adapter")
    merge(base, {"a": tmp_path / "adapter"}, out=tmp_path / "out")
    peft = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter").merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    batch = batch_for(peft)
    torch.testing.assert_close(ours(**batch).logits, peft(**batch).logits, rtol=1e-4, atol=1e-5)


def test_untouched_tensors_are_bit_for_bit_the_bases(tmp_path: Path) -> None:
    """Also those of a dtype that torch would not read as numbers here, and where nothing has a LoRA."""
    base = saved_base(tmp_path / "base", dtype="bfloat16")
    merge(base, {"a": adapter_for(tiny("llama"), ("q_proj",))}, out=tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [name for name in sorted(before) if "q_proj" in name]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_bfloat16_is_rounded_once(dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = tiny("llama").bfloat16()
    model.save_pretrained(tmp_path / "base")
    adapters = {"a": adapter_for(model, ("q_proj",))}
    merge(tmp_path / "base", adapters, out=tmp_path / "out", dtype=dtype)
    name = "model.layers.1.self_attn.q_proj.weight"
    exact = model.get_parameter(name).detach().float()
    lora = adapters["a"].factors[name.removesuffix(".weight")]
    exact = exact.addmm(lora.scale * lora.B, lora.A)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written[name].dtype == (dtype or torch.bfloat16)
    if written[name].dtype == torch.float32:
        torch.testing.assert_close(written[name], exact, rtol=1e-5, atol=1e-5)
    else:  # float32 factors through core space: an entry in a hundred may round to its neighbour
        assert (written[name] == exact.to(written[name].dtype)).float().mean() > 0.99
    in_config = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
    assert in_config == str(dtype or torch.bfloat16).removeprefix("torch.")


def test_a_16_bit_model_in_memory_is_rounded_once_too() -> None:
    model = tiny("llama").bfloat16()
    (name, lora), *_ = adapter_for(model, ("q_proj",)).factors.items()
    exact = model.get_submodule(name).weight.detach().float().addmm(lora.scale * lora.B, lora.A)
    merge(model, {"a": {name: lora}})
    assert (model.get_submodule(name).weight == exact.bfloat16()).float().mean() > 0.99


def test_prefixes_may_be_missing_or_added_on_disk(tmp_path: Path) -> None:
    """GPT-2's published files say h.0..., the model says transformer.h.0..."""
    base = saved_base(tmp_path / "base", "gpt2")
    tensors = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    model = tiny("gpt2")
    adapters = pair(model, "gpt2")
    merge(base, adapters, weights=[1.0, 1.0], out=tmp_path / "out")
    expected = merged_weights(model, adapters, [1.0, 1.0])
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor.double(), expected[f"transformer.{name}"], rtol=1e-5, atol=1e-6)


def test_into_one_adapter_that_peft_loads(tmp_path: Path) -> None:
    base, model = saved_base(tmp_path / "base"), tiny("llama")
    adapters = pair(model, "llama")
    merge(base, adapters, "svd", weights=[0.5, 2.0], rank=2, out=tmp_path / "out", kind="lora")
    merge(tiny("llama"), adapters, "svd", weights=[0.5, 2.0], rank=2, out=tmp_path / "same", kind="lora")
    read = read_adapter(tmp_path / "out")
    assert {lora.A.shape[0] for lora in read.factors.values()} == {2}
    assert read.base == str(base)
    again = read_adapter(tmp_path / "same")
    merged = PeftModel.from_pretrained(tiny("llama"), tmp_path / "out").merge_and_unload()
    for name, lora in read.factors.items():
        torch.testing.assert_close(dense(lora), dense(again.factors[name]))
        update = merged.get_submodule(name).weight - model.get_submodule(name).weight
        torch.testing.assert_close(update.double(), dense(lora), rtol=1e-4, atol=1e-5)


def with_whole(adapter: Adapter, value: torch.Tensor) -> Adapter:
    return Adapter(name=adapter.name, factors=adapter.factors, whole={"lm_head.weight": value})


def test_modules_trained_whole(tmp_path: Path) -> None:
    base, head = saved_base(tmp_path / "base", tie_word_embeddings=False), torch.randn(64, 32)
    one, two = (adapter_for(tiny("llama"), ("q_proj",), seed=seed) for seed in range(2))
    given = {"x": with_whole(one, head), "y": with_whole(two, head)}
    merge(base, given, out=tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], head)
    model = tiny("llama", tie_word_embeddings=False)
    merge(model, given)
    assert torch.equal(model.lm_head.weight, head)
    for disagreeing in (with_whole(two, head + 1), two):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
            merge(base, {"x": with_whole(one, head), "y": disagreeing}, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_tied_embeddings_stay_one_and_a_tied_head_is_refused(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", tie_word_embeddings=True)
    merge(base, {"a": adapter_for(tiny("llama"), ("q_proj",))}, out=tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    head = adapter_for(tiny("llama"), ("lm_head",))
    for target in (base, tiny("llama", tie_word_embeddings=True)):
        with pytest.raises(TargetError, match=r"lm_head.weight and .* are one parameter"):
            merge(target, {"a": head}, out=tmp_path / "no" if target is base else None)


def test_memory_holds_one_tensor(tmp_path: Path) -> None:
    """Bytes of tensors are Python's own, so tracemalloc sees them: two of the largest at once would be twice this."""
    base = saved_base(tmp_path / "base", vocab_size=8000, tie_word_embeddings=False)
    opened, factors = checkpoint.open_base(base), adapter_for(tiny("llama"), ("q_proj",)).factors
    largest = max(slot.header.num_bytes for slot in opened.slots.values())
    total = sum(slot.header.num_bytes for slot in opened.slots.values())
    assert total > 2 * largest
    tracemalloc.start()
    checkpoint.write_dense(opened, factors, {}, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * largest


def test_an_interrupted_merge_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = saved_base(tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")

    def pull_the_plug(name: str) -> None:
        if "layers.1" in name:
            raise KeyboardInterrupt

    opened = checkpoint.open_base(base)
    factors = adapter_for(tiny("llama"), ("q_proj",)).factors
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_dense(opened, factors, {}, out, on_tensor=pull_the_plug)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def refusals(tmp_path: Path):
    base, model = saved_base(tmp_path / "base"), tiny("llama")
    good = adapter_for(model, ("q_proj",))
    name = next(iter(good.factors))
    narrow = Adapter(name="n", factors={name: LoRA(torch.ones(1, 8), torch.ones(32, 1), 1.0)})
    absent = Adapter(name="n", factors={"transformer.h.0.q_proj": LoRA(torch.ones(1, 8), torch.ones(8, 1), 1.0)})
    quantised = saved_base(tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    out = tmp_path / "out"
    yield TargetError, "another architecture", (base, {"n": absent}), {"out": out}
    yield TargetError, "8 -> 32, here it is", (base, {"n": narrow}), {"out": out}
    yield TargetError, "another architecture", (model, {"n": absent}), {}
    yield ConfigError, "say where the result goes", (base, {"n": good}), {}
    yield ConfigError, "then save_pretrained", (model, {"n": good}), {"out": out}
    yield ConfigError, "keeps its own", (model, {"n": good}), {"dtype": torch.float16}
    yield ConfigError, "say where, out=FOLDER", (model, {"n": good}), {"kind": "lora"}
    yield ConfigError, "choose from 'dense', 'lora'", (base, {"n": good}), {"out": out, "kind": "moe"}
    yield ConfigError, "did you mean 'linear'", (base, {"n": good}, "linar"), {"out": out}
    yield ConfigError, "give a mapping of names", (base, {}), {"out": out}
    yield ConfigError, "shard_size='5 apples'", (base, {"n": good}), {"out": out, "shard_size": "5 apples"}
    yield ConfigError, "zero everywhere", (base, {"n": good}, "linear", [0.0]), {"out": out, "kind": "lora"}
    yield CheckpointError, "holds weights already", (base, {"n": good}), {"out": base}
    yield CheckpointError, "is quantised", (quantised, {"n": good}), {"out": out}
    yield CheckpointError, "cannot be read", (tmp_path, {"n": good}), {"out": out}
    yield StateError, "is a mixture", (mixture_of().model, {"n": good}), {}


def test_refusals_say_why_and_change_nothing(tmp_path: Path) -> None:
    for kind, message, arguments, options in refusals(tmp_path):
        before = None if isinstance(arguments[0], Path) else {n: p.clone() for n, p in arguments[0].named_parameters()}
        with pytest.raises(kind, match=message) as caught:
            merge(*arguments, **options)
        assert isinstance(caught.value, MolexError)
        assert not (tmp_path / "out").exists(), message
        if before is not None:
            assert all(torch.equal(before[n], p) for n, p in arguments[0].named_parameters())


def test_quantised_sharded_and_offloaded_weights_are_refused_by_name() -> None:
    model = tiny("llama")
    adapters = {"a": adapter_for(model, ("q_proj",))}
    first = model.model.layers[0].self_attn.q_proj.weight.clone()
    last = model.model.layers[1].self_attn.q_proj
    weight = last.weight
    for bad in (weight.data.to(torch.float8_e4m3fn), weight.data.to("meta")):
        last.weight = torch.nn.Parameter(bad, requires_grad=False)
        with pytest.raises(TargetError, match=r"layers\.1\.self_attn\.q_proj is"):
            merge(model, adapters)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, first)


def test_streamed_files_are_what_the_library_reads(tmp_path: Path) -> None:
    """Mixed dtypes, a scalar and an empty tensor, odd sizes before wide ones."""
    tensors = {
        "odd": torch.randn(3).bfloat16(),
        "wide": torch.randn(2, 3, dtype=torch.float64),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 4),
        "é": torch.randn(5).half(),
    }
    entries = [Entry.of(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()]
    write_stream(tmp_path / "x.safetensors", entries, {"format": "pt"})
    read = load_file(tmp_path / "x.safetensors")
    slots = read_slots(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)
        assert torch.equal(slots[name].tensor(), tensor)
        assert slots[name].start % tensor.element_size() == 0
