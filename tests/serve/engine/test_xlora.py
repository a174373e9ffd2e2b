"""X-LoRA through both engines: token for token what each mixture's own `generate` gives, however steps are cut."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, PreTrainedModel

import molex
from molex_serve.assembly import assemble
from molex_serve.engine.base import Engine, Request, Sampling
from molex_serve.engine.continuous import ContinuousEngine
from molex_serve.engine.static import StaticEngine
from molex_serve.errors import BadAdapter
from molex_serve.model.served import ServedModel
from molex_serve.model.step import FirstPass, Step
from molex_serve.settings import EngineSettings
from tests.models import tiny
from tests.serve.adapters_of import fill, own_model, save_lora, save_mixture
from tests.serve.engine.serving import CHUNKED, CRAMPED, ROOMY, prompt, running, serve, submit, tokenizer
from tests.serve.engine.test_mla import deepseek

ENGINES = {"continuous": ContinuousEngine, "static": StaticEngine}
SETTINGS = {"roomy": ROOMY, "chunked": CHUNKED, "cramped": CRAMPED, "no prefixes": replace(CRAMPED, prefix_cache=False)}
EVERYONE = ("base", "one", "two", "law", "mola")
NEW = 12


class Counting(ServedModel):
    """num_fed: tokens of all steps; num_stacks: how often layers were run."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self.num_fed = self.num_stacks = 0
        self.stack.register_forward_hook(self._count)

    def begin_step(self, step: Step | None, first_pass: FirstPass | None = None) -> None:
        self.num_fed += 0 if step is None else len(step.handles)
        super().begin_step(step, first_pass)

    def _count(self, *call: object) -> None:
        self.num_stacks += 1


def save_xlora(name: str, base: PreTrainedModel, folder: Path, **overrides: Any) -> None:
    """Weights differ much from token to token and from layer to layer."""
    settings = {"num_experts": 3, "rank": 2, "depth": 2, "hidden_size": 8, "layerwise": True, "temperature": 0.2}
    mixture = molex.convert(base, molex.preset("xlora", **{**settings, **overrides}))
    for part in ("lora_B", "router"):
        fill(base, part, name)
    mixture.save(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    save_xlora("one", tiny("llama"), folder)
    save_xlora("two", tiny("llama"), folder, layerwise=False, top_k=2, targets=("q_proj", "down_proj"))
    save_lora("law", tiny("llama"), folder)
    save_mixture("mola", tiny("llama"), folder)
    return folder


def attach(served: ServedModel, folder: Path, names: tuple[str, ...]) -> dict[str, int]:
    read = {name: served.read(str(folder / name), two_passes=True) for name in names if name != "base"}
    return {"base": 0} | {name: served.attach(adapter) for name, adapter in read.items()}


def requests(handles: dict[str, int], number: int, new: int = NEW) -> list[Request]:
    names = list(handles)
    return [
        Request(
            id=f"{names[i % len(names)]}, {i}",
            prompt_ids=prompt(1 + 7 * i % 23, seed=i),
            sampling=Sampling(max_tokens=new, temperature=0),
            handle=handles[names[i % len(names)]],
            generation="" if names[i % len(names)] == "base" else names[i % len(names)],
        )
        for i in range(number)
    ]


def generated(asked: list[Request], models: dict[str, PreTrainedModel]) -> list[list[int]]:
    found = []
    for request in asked:
        ids = torch.tensor([request.prompt_ids])
        with torch.no_grad():
            whole = models[request.id.partition(",")[0]].generate(  # type: ignore[operator]
                ids, max_new_tokens=request.sampling.max_tokens, do_sample=False
            )
        found.append(whole[0, ids.shape[1] :].tolist())
    return found


def models(folder: Path) -> dict[str, PreTrainedModel]:
    return {name: own_model(name, folder) for name in EVERYONE}


@contextmanager
def serving(kind: str, folder: Path, settings: EngineSettings = ROOMY) -> Iterator[tuple[Engine, dict[str, int]]]:
    served = Counting(tiny("llama"))
    handles = attach(served, folder, EVERYONE)
    with running(ENGINES[kind](served, tokenizer(), replace(settings, two_passes=True))) as engine:
        yield engine, handles


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_steps_cut_anyhow(settings: EngineSettings, folder: Path) -> None:
    """Prompts in chunks, fresh starts where pages are few, and prefixes that an earlier request left."""
    with serving("continuous", folder, settings) as (engine, handles):
        asked = requests(handles, 10)
        once = sum(len(request.prompt_ids) + NEW - 1 for request in asked)
        found, num_fed = serve(engine, asked), engine.served.num_fed  # type: ignore[attr-defined]
        again, is_cramped = serve(engine, asked), settings.cache_tokens == CRAMPED.cache_tokens
        assert (num_fed > once) == is_cramped, "nobody was to start anew, or somebody"
        assert (engine.stats().prefix_hits > 0) != is_cramped, "prefixes were to stay, or not"
        assert engine.stats().cache_free == engine.stats().cache_total
    assert found == again == generated(asked, models(folder))
    assert len({tuple(tokens) for tokens in generated(requests(dict.fromkeys(EVERYONE, 0), 5), models(folder))}) == 5


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba2"])
def test_static_engine(name: str, tmp_path: Path) -> None:
    targets = {"targets": "ssm"} if name == "mamba2" else {}
    save_xlora("one", tiny(name), tmp_path, **targets)
    save_xlora("two", tiny(name), tmp_path, **targets, layerwise=False)
    served = ServedModel(tiny(name))
    asked = requests(attach(served, tmp_path, ("base", "one", "two")), 7)
    with running(StaticEngine(served, tokenizer(), replace(ROOMY, cache_tokens=96, step_requests=3))) as engine:
        found = serve(engine, asked)
    assert found == generated(asked, {name_: own_model(name_, tmp_path, name) for name_ in ("base", "one", "two")})


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "gpt2", "opt"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """Among them rings of pages for sliding windows, which are read before they are written."""
    save_xlora("one", tiny(name), tmp_path)
    served = ServedModel(tiny(name))
    asked = requests(attach(served, tmp_path, ("base", "one")), 5)
    with running(ContinuousEngine(served, tokenizer(), replace(CHUNKED, two_passes=True))) as engine:
        found = serve(engine, asked)
    assert found == generated(asked, {"base": tiny(name), "one": own_model("one", tmp_path, name)})


def test_latent_attention_over_a_base_with_experts(tmp_path: Path) -> None:
    def base() -> PreTrainedModel:
        return deepseek(DeepseekV2Config, qk_nope_head_dim=12, v_head_dim=10)

    save_xlora("one", base(), tmp_path, targets=("q_proj", "o_proj"))
    served = ServedModel(base())
    asked = requests(attach(served, tmp_path, ("base", "one")), 4)
    with running(ContinuousEngine(served, tokenizer(), replace(CHUNKED, two_passes=True))) as engine:
        found = serve(engine, asked)
    mixture = molex.load(base(), tmp_path / "one").model.eval()
    assert found == generated(asked, {"base": base(), "one": mixture})  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", ENGINES)
def test_cancelled_ones_leave_the_others_alone(kind: str, folder: Path) -> None:
    with serving(kind, folder, CHUNKED) as (engine, handles):
        asked = requests(handles, 10, new=24)
        listeners = submit(engine, asked)
        leaving = [i for i, request in enumerate(asked) if request.id.startswith(("one", "law"))]
        for i in leaving:
            engine.cancel(asked[i].id)
        found = [listener.wait() for listener in listeners]
        assert {found[i].reason for i in leaving} == {"cancelled"}
        assert engine.stats().cache_free == engine.stats().cache_total
        again = serve(engine, asked[:5])
    expected = generated(asked, models(folder))
    for i, listener in enumerate(found):
        assert listener.tokens == expected[i][: len(listener.tokens)]
        assert listener.tokens == expected[i] or i in leaving
    assert again == expected[:5]


@pytest.mark.parametrize("kind", ENGINES)
def test_scores_and_experts(kind: str, folder: Path) -> None:
    with serving(kind, folder) as (engine, handles):
        (asked,) = [request for request in requests(handles, 5) if request.handle == handles["one"]]
        scores = engine.score(asked.prompt_ids, asked.handle, None, 0)
        (listener,) = submit(engine, [replace(asked, experts=True)])
        experts = [share for event in listener.wait().events for share in event.experts]
    mixture = molex.load(tiny("llama"), folder / "one")
    ids_1T = torch.tensor([[*asked.prompt_ids, *listener.tokens]])
    with torch.no_grad():
        logprobs_TV = mixture.model.eval()(ids_1T).logits[0].log_softmax(-1)
    wanted = [float(logprobs_TV[t, token]) for t, token in enumerate(asked.prompt_ids[1:])]
    assert [score.logprob for score in scores] == pytest.approx(wanted, abs=1e-5)
    gates = [decision.routing.gates() for decision in mixture.state.trace.values()]
    shares_T, experts_T = torch.stack(gates).mean(0)[len(asked.prompt_ids) - 1 : -1].max(-1)
    assert [share.name for share in experts if share] == [mixture.experts[i] for i in experts_T.tolist()]
    assert [share.share for share in experts if share] == pytest.approx(shares_T.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ENGINES)
def test_steps_without_them_take_one_pass(kind: str, folder: Path) -> None:
    with serving(kind, folder) as (engine, handles):
        served: Counting = engine.served  # type: ignore[attr-defined]
        for name, passes in (("base", 1), ("law", 1), ("one", 2)):
            before = served.num_stacks
            serve(engine, requests({name: handles[name]}, 1))
            assert served.num_stacks - before == passes * NEW, name


def test_refused_when_loaded_where_there_is_no_second_cache(folder: Path) -> None:
    for two_passes, static in ((False, False), (True, False), (False, True)):
        settings = replace(ROOMY, two_passes=two_passes)
        assembly = assemble(tiny("llama"), tokenizer(), {"x": str(folder / "one")}, engine=settings, static=static)
        try:
            if two_passes or static:
                assembly.registry.resolve("x").release()
            else:
                with pytest.raises(BadAdapter, match="serve with --two-passes or --static"):
                    assembly.registry.resolve("x")
            assert bool(assembly.served.routed) == (two_passes or static)
        finally:
            assembly.close()
