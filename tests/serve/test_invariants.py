"""What must hold however requests, adapters and steps are mixed, where no narrower test has it already.

Elsewhere: of a dense base's adapters in one engine (test_together.py), of damaged folders (model/test_refused.py,
test_faults.py), of over-long prompts and cancels (engine/test_lifecycle.py, test_faults.py).
"""

import copy
import gc
import json
import os
import random
import shutil
import threading
import weakref
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import PreTrainedModel

import molex
from molex_serve.adapters.content import generation_of
from molex_serve.adapters.registry import Registry
from molex_serve.adapters.residency import Residency
from molex_serve.engine.base import Request, Sampling
from molex_serve.engine.continuous import ContinuousEngine
from molex_serve.errors import LoadBusy, UnknownAdapter
from molex_serve.memory.base import Arena
from molex_serve.memory.calculator import SwapBase, expert_bytes, low_rank_bytes
from molex_serve.model.served import ServedModel
from molex_serve.model.step import BASE, FirstPass, Span, Step
from molex_serve.settings import AdapterLimits
from tests.esft.models import moe
from tests.models import tiny, wake_experts
from tests.serve.adapters_of import fill, own_model, save_lora
from tests.serve.assembled import expected, expected_text, serving
from tests.serve.engine.conftest import little_garbage  # noqa: F401 (a fixture)
from tests.serve.engine.serving import (
    CHUNKED,
    CRAMPED,
    ROOMY,
    Adapted,
    Listener,
    greedy,
    prompt,
    running,
    serve,
    submit,
    tokenizer,
)
from tests.serve.expert_swaps import ADAPTERS, merged, save_swap

CROWDED = replace(CRAMPED, prefix_cache=False)  # requests lose their places, and start anew
ATTENTION = {"mixtral": ["q_proj", "v_proj"], "deepseek_v2": ["q_proj", "kv_b_proj", "o_proj"]}
EVERYONE = ("base", "law", "code", "lora", "mola")
NEW = 8
PAGE = os.sysconf("SC_PAGE_SIZE")
needs_proc = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="no /proc here")


class Watched(ServedModel):
    """Checks before each step that what its tables name is there. num_fed: tokens of all steps."""

    num_fed = 0

    def begin_step(self, step: Step | None, first_pass: FirstPass | None = None) -> None:
        self.num_fed += 0 if step is None else len(step.handles)
        for handle in () if step is None else step.present:
            assert handle in self.pool.places or handle in self.routed or handle in self.experts_of(), handle
        for layer in self.experts.layers.values() if self.experts is not None else ():
            for slot in layer.table.unique().tolist():
                assert layer.gate_up._rows[slot], f"slot {slot} of {layer.layer.name} is empty"
                assert layer.down._rows[slot], f"slot {slot} of {layer.layer.name} is empty"
        for handle, place in self.pool.places.items():
            sites = [site for site in self.pool.sites.values() if handle in site.holders]
            assert sites
            assert all(memory._rows[place.slot] for site in sites for memory in site.by_rank[place.rank])
        super().begin_step(step, first_pass)

    def experts_of(self) -> frozenset[int]:
        return frozenset() if self.experts is None else self.experts.handles()


def save_all(architecture: str, folder: Path) -> dict[str, PreTrainedModel]:
    """Expert swaps, a LoRA of the attention and a mixture in it, over one base; and the model that each one means."""
    model, attention = moe(architecture), ATTENTION[architecture]
    lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=attention))
    fill(lora, "lora_B", "lora")
    lora.save_pretrained(str(folder / "lora"))
    mixed = copy.deepcopy(model)
    routed = [name for name in attention if name != "kv_b_proj"]  # the model alone would compute it over its cache, too
    mixture = molex.convert(mixed, molex.preset("mola", targets=routed, num_experts=3, rank=2, allocation=None))
    wake_experts(mixed)
    fill(mixed, "router", "mola")
    mixture.save(folder / "mola")
    swapped = {name: merged(model, save_swap(name, model, folder)) for name in ("law", "code")}
    return {"base": model, **swapped, "lora": lora.merge_and_unload(), "mola": mixed.eval()}  # type: ignore[dict-item]


@pytest.mark.parametrize("architecture", ATTENTION)
def test_a_mixed_batch_over_experts_is_each_merged_model(architecture: str, tmp_path: Path) -> None:
    """1. Expert swaps, LoRAs and mixtures: prompts in chunks, requests that start anew, prefixes that are found."""
    models = save_all(architecture, tmp_path)
    served = Watched(moe(architecture))
    handles = {name: served.attach(served.read(str(tmp_path / name))) for name in EVERYONE if name != "base"}
    asked = [
        Request(
            id=f"{name}, {same}",
            prompt_ids=prompt(13) if same else prompt(3 + 7 * number, seed=number),
            sampling=Sampling(max_tokens=NEW, temperature=0),
            handle=handles.get(name, BASE),
            generation=name if name in handles else "",
        )
        for same in (True, False)
        for number, name in enumerate(EVERYONE)
    ]
    truth = [expected(models[request.id.partition(",")[0]], request.prompt_ids) for request in asked]
    assert len({tuple(tokens) for tokens in truth}) > len(EVERYONE), "the adapters do nothing"
    for settings in (ROOMY, CHUNKED, CRAMPED, CROWDED):
        served.num_fed = 0
        with running(ContinuousEngine(served, tokenizer(), settings)) as engine:
            assert serve(engine, asked) == truth
            fed = served.num_fed
            assert serve(engine, asked) == truth, "again"
            if settings is not CRAMPED:  # where a prefix may have lost its pages
                assert (engine.stats().prefix_hits > 0) == settings.prefix_cache
    assert fed > sum(len(request.prompt_ids) + NEW - 1 for request in asked), "nothing started anew"


def test_every_choice_over_http_is_the_merged_models(tmp_path: Path) -> None:
    """1. Several choices of several prompts, whole and streamed, by all adapters at once."""
    models = save_all("mixtral", tmp_path)
    prompts = [prompt(13), prompt(5, seed=1)]
    truth = {name: [expected_text(model, ids) for ids in prompts] for name, model in models.items()}

    def ask(name: str) -> list[str]:
        asked = {"model": name, "prompt": prompts, "n": 2, "max_tokens": NEW, "temperature": 0}
        whole = server.http.post("/v1/completions", json=asked)
        assert whole.status_code == 200, whole.text
        return [choice["text"] for choice in whole.json()["choices"]]

    def stream(name: str) -> list[str]:
        texts = [""] * 4
        asked = {"model": name, "prompt": prompts, "n": 2, "max_tokens": NEW, "temperature": 0, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=asked) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        texts[choice["index"]] += choice["text"]
        return texts

    folders = {name: tmp_path / name for name in EVERYONE if name != "base"}
    with serving(moe("mixtral"), tmp_path, folders, CHUNKED) as server, ThreadPoolExecutor() as pool:
        whole = dict(zip(EVERYONE, pool.map(ask, EVERYONE), strict=True))
        streamed = dict(zip(EVERYONE, pool.map(stream, EVERYONE), strict=True))
        server.wait_until_idle()
    assert whole == streamed == {name: [text for text in texts for _ in range(2)] for name, texts in truth.items()}


def test_prefixes_are_found_within_a_generation_alone(tmp_path: Path) -> None:
    """2. The same prompt under the same alias: another content's keys and values are never used, its own are."""
    for name in ("law", "code"):
        save_lora(name, tiny("llama"), tmp_path)
    shutil.copytree(tmp_path / "code", tmp_path / "same")
    ids = prompt(21)
    truth = {name: expected_text(own_model(name, tmp_path), ids) for name in ("law", "code")}
    assert truth["law"] != truth["code"]
    one_place = AdapterLimits(resident=1)  # and one handle, whoever has it
    with serving(tiny("llama"), tmp_path, {}, limits=one_place) as server:

        def hits(path: str) -> float:
            """Of a question that follows a load."""
            assert server.load("alias", path).status_code == 200
            before = server.metric("molex_prefix_hit_tokens_total")
            assert server.text("alias", ids) == truth["law" if path == "law" else "code"]
            return server.metric("molex_prefix_hit_tokens_total") - before

        assert [hits(path) for path in ("law", "law", "code", "same", "law")] == [0, 20, 0, 20, 20]
        assert server.generation("alias") == generation_of(tmp_path / "law")


def resident_of(memories: list[Arena]) -> int:
    """Bytes that the kernel holds of these tensors, in memory or swapped out, page by page."""
    num_pages = 0
    with Path("/proc/self/pagemap").open("rb") as table:
        for memory in memories:
            first = memory.tensor.data_ptr() // PAGE
            table.seek(8 * first)
            pages = array("Q", table.read(8 * -(-memory.num_bytes // PAGE)))
            num_pages += sum(page >> 62 > 0 for page in pages)
    return num_pages * PAGE


@needs_proc
def test_an_unload_gives_back_the_bytes_that_were_counted(tmp_path: Path) -> None:
    """3. The kernel's count of the device's mappings, and the host's tensors; once the last lease is released."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024}
    for name in ("law", "code"):
        model = peft.get_peft_model(tiny("llama", **sizes), peft.LoraConfig(r=16, target_modules="all-linear"))
        fill(model, "lora_B", name)
        model.save_pretrained(str(tmp_path / name))
    served = ServedModel(tiny("llama", **sizes))
    residency = Residency(served.attach, served.detach, served.read, nullcontext, served.limits)
    registry = Registry(residency)

    def bytes_of(name: str) -> tuple[int, int, "weakref.ref[object]"]:
        """Counted and resident ones that a load brings; and what is in the host's memory."""
        counted, there = served.pool.committed_bytes(), resident_of(arenas())
        registry.load(name, str(tmp_path / name))
        host = residency._generations[generation_of(tmp_path / name)].host
        return served.pool.committed_bytes() - counted, resident_of(arenas()) - there, weakref.ref(host)

    def arenas() -> list[Arena]:
        return [memory for site in served.pool.sites.values() for memory in site.arenas()]

    bytes_of("law")
    counted, there, host = bytes_of("code")
    assert counted == there >= 1 << 20
    with registry.resolve("code"):
        both = resident_of(arenas())
        registry.unload("code")
        assert resident_of(arenas()) == both
        assert host() is not None
    residency.settle()
    gc.collect()
    assert both - resident_of(arenas()) == counted
    assert host() is None
    registry.unload("law")
    assert (resident_of(arenas()), served.pool.committed_bytes(), residency.counts().host_bytes) == (0, 0, 0)
    registry.close()


@pytest.mark.parametrize("seed", range(2))
def test_whatever_comes_and_goes_what_a_step_names_is_there(seed: int, tmp_path: Path) -> None:
    """5. Loads, unloads, reloads and requests at once, with too few places, columns and expert slots for all."""
    models = save_all("mixtral", tmp_path)
    folders = [name for name in EVERYONE if name != "base"]
    ids = prompt(9)
    truth = {generation_of(tmp_path / name): expected(models[name], ids) for name in folders}
    limits = AdapterLimits(resident=2, expert_slots=4, columns=16)
    served = Watched(moe("mixtral"), limits)
    engine = ContinuousEngine(served, tokenizer(), CHUNKED)
    residency = Residency(served.attach, served.detach, served.read, engine.paused, limits, wait_seconds=20)
    registry = Registry(residency)
    answered: list[str] = []

    def change(dice: random.Random) -> None:
        for _ in range(12):
            alias = dice.choice("abc")
            try:
                if dice.random() < 0.7:
                    registry.load(alias, str(tmp_path / dice.choice(folders)))
                else:
                    registry.unload(alias)
            except (UnknownAdapter, LoadBusy):
                pass

    def ask(dice: random.Random) -> None:
        for number in range(8):
            try:
                lease = registry.resolve(dice.choice("abc"))
            except UnknownAdapter:
                continue
            with lease:
                request = Request(
                    id=f"{threading.get_ident()} {number}",
                    prompt_ids=ids,
                    sampling=Sampling(max_tokens=NEW, temperature=0),
                    handle=lease.handle,
                    generation=lease.generation,
                )
                (listener,) = submit(engine, [request])
                assert listener.wait().tokens == truth[lease.generation]
                answered.append(lease.generation)

    with running(engine), ThreadPoolExecutor() as pool:
        for alias, name in zip("abc", folders, strict=False):
            registry.register(alias, tmp_path / name)
        jobs = [pool.submit(what, random.Random(10 * seed + i)) for i, what in enumerate((change, ask, ask, ask, ask))]
        for job in jobs:
            job.result(60)
        assert residency.counts().evictions > 0
        assert len(set(answered)) > 2
        for listed in registry.listing():
            registry.unload(listed.alias)
        assert (residency.counts().resident, served.pool.committed_bytes()) == (0, 0)
    registry.close()
    assert served.experts is not None
    assert served.experts.free_slots() == limits.expert_slots


@pytest.mark.parametrize("seed", range(2))
def test_random_arrivals_and_cancels_keep_to_the_cap(seed: int) -> None:
    """6. Never more different adapters in a step than there are places, whoever leaves; test_scheduler.py has waits."""
    adapted, dice = Adapted(), random.Random(seed)
    left = [greedy(str(i), dice.randint(3, 9), dice.randrange(6), dice.randint(2, 12), seed=i) for i in range(24)]
    requests, listeners = [*left], {request.id: Listener() for request in left}
    gone = {request.id for request in requests if dice.random() < 0.3}
    with running(adapted.engine(replace(ROOMY, step_adapters=2, drain_steps=6))) as engine:
        while left:
            number = dice.randint(1, 6)
            now, left = left[:number], left[number:]
            with engine.paused():
                for request in now:
                    engine.submit(request, listeners[request.id])
                for name in sorted(gone):
                    if dice.random() < 0.3:
                        engine.cancel(name)
        for name in gone:
            engine.cancel(name)
        for listener in listeners.values():
            listener.wait()
    assert max(len(step.present) for step in adapted.steps) == 2
    for request in requests:
        whole, found = adapted.generate(request), listeners[request.id]
        assert found.tokens == (whole[: len(found.tokens)] if request.id in gone else whole), request.id


class Bare:
    """A model as it is, as an engine takes it."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def begin_step(self, step: Step | None, first_pass: FirstPass | None = None) -> None: ...
    def attribution(self, handle: int) -> None: ...
    def check_task(self, handle: int, task: int | None) -> None: ...


def test_a_batch_of_the_base_is_the_unmodified_models_bit_for_bit(tmp_path: Path) -> None:
    """8. Log-probabilities too, with adapters of every kind on the device, and after they have been served."""
    save_all("mixtral", tmp_path)
    asked = [
        replace(greedy(str(i), 5 + 4 * i), sampling=Sampling(max_tokens=NEW, temperature=0, logprobs=3))
        for i in range(4)
    ]

    def answers(served: Bare | ServedModel, others: Callable[[ContinuousEngine], object]) -> list[list[object]]:
        settings = replace(CHUNKED, prefix_cache=False)
        with running(ContinuousEngine(served, tokenizer(), settings)) as engine:
            others(engine)
            with engine.paused():
                listeners = submit(engine, asked)
            return [[(event.token_ids, event.logprobs) for event in own.wait().events] for own in listeners]

    model = moe("mixtral")
    model.set_experts_implementation("batched_mm")  # not as experts are computed for adapters
    plain = answers(Bare(copy.deepcopy(model)), lambda engine: None)
    served = ServedModel(model)
    handles = [served.attach(served.read(str(tmp_path / name))) for name in EVERYONE if name != "base"]
    mixed = [greedy(f"of {handle}", 7, handle) for handle in handles]
    assert answers(served, lambda engine: serve(engine, mixed)) == plain


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_tokens_that_pad_a_step_are_the_bases(architecture: str, tmp_path: Path) -> None:
    """8. As an engine with inputs of a fixed size has them: behind the last request's, with handle 0."""
    made = moe if architecture == "mixtral" else tiny
    save = save_swap if architecture == "mixtral" else save_lora
    folders = [save(name, made(architecture), tmp_path) for name in ("law", "code")]
    served = ServedModel(made(architecture))
    law, code = (served.attach(served.read(str(folder))) for folder in folders)
    ids = torch.tensor([prompt(4, seed=seed) for seed in range(3)])
    handles = torch.tensor([law] * 4 + [code] * 2 + [0] * 6)
    with torch.no_grad():
        plain = made(architecture)(ids).logits
        served.begin_step(Step((Span(law, 0, 4), Span(code, 4, 6)), handles))
        found = served.model(ids).logits
        served.begin_step(None)
    torch.testing.assert_close(found[2], plain[2], atol=1e-5, rtol=1e-5)
    for row in range(2):
        assert (found[row, :2] - plain[row, :2]).abs().max() > 1e-2


@needs_proc
def test_the_calculator_is_within_a_page_of_what_the_kernel_counts(tmp_path: Path) -> None:
    """9. A page for each adapter, layer and tensor: of expert swaps and of LoRAs, each in its pool."""
    hidden, inner = 72, 56
    model = moe("mixtral", hidden_size=hidden, intermediate_size=inner)
    served = ServedModel(moe("mixtral", hidden_size=hidden, intermediate_size=inner))
    assert served.experts is not None
    swaps = [served.read(str(save_swap(name, model, tmp_path))) for name in ADAPTERS]
    base = SwapBase(
        num_bytes=0, num_layers=3, num_experts=6, expert_bytes=expert_bytes(hidden, inner, 4), cache_bytes=1
    )
    slots = [memory for layer in served.experts.layers.values() for memory in (layer.gate_up, layer.down)]
    empty = resident_of(slots)
    handles = [served.attach(swap) for swap in swaps]
    counted = base.slots([[len(ADAPTERS[name].get(layer, ())) for layer in range(3)] for name in ADAPTERS])
    assert abs(resident_of(slots) - empty - counted) <= len(ADAPTERS) * 3 * 2 * PAGE
    for handle in handles:
        served.detach(handle)
    assert resident_of(slots) == empty
    ranks, targets = (8, 12, 40), ["q_proj", "k_proj", "o_proj"]
    for rank in ranks:
        lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=rank, target_modules=targets))
        fill(lora, "lora_B", "lora")
        lora.save_pretrained(str(tmp_path / str(rank)))
        served.attach(served.read(str(tmp_path / str(rank))))
    columns = [memory for site in served.pool.sites.values() for memory in site.arenas()]
    counted = sum(low_rank_bytes(rank, [(hidden, hidden)] * 3 * 3, 4) for rank in ranks)
    assert 0 <= resident_of(columns) - counted <= len(ranks) * 3 * 3 * 2 * PAGE
