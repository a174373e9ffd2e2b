"""The contestants of serving benchmarks: the base as it is and with adapters, each on an engine of its own.

Also what a step of theirs consists of, and whether what they say is right.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.serving_bases import Kind
from benchmarks.serving_trace import Arrival, Replayed, replay
from molex.errors import TargetError
from molex.esft import find_layers
from molex.workbench import load_tokenizer
from molex_serve.engine.continuous import ContinuousEngine
from molex_serve.model.routed import Attribution
from molex_serve.model.served import ServedModel
from molex_serve.model.step import FirstPass, Step
from molex_serve.settings import EngineSettings

CHECKED = 3  # adapters that are compared with merged models
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of the logits' deviation


class Untouched:
    """A model without adapters, as an engine needs it."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def begin_step(self, step: Step | None, first_pass: FirstPass | None = None) -> None: ...

    def attribution(self, handle: int) -> Attribution | None: ...

    def check_task(self, handle: int, task: int | None) -> None: ...


@dataclass
class Way:
    """handles: of its adapters; none = all requests are the base's."""

    engine: ContinuousEngine
    served: ServedModel | Untouched
    handles: list[int] = field(default_factory=list)
    names: Iterator[int] = field(default_factory=count)

    def replay(self, trace: Sequence[Arrival]) -> Replayed:
        return replay(self.engine, trace, self.handles, f"replay {next(self.names)}")


@contextmanager
def running(base: PreTrainedModel, served: ServedModel, settings: EngineSettings) -> Iterator[dict[str, Way]]:
    """Until the end of the block."""
    contestants = {"base": Untouched(base), "served": served}
    ways = {
        name: Way(ContinuousEngine(adapted, load_tokenizer(), settings), adapted)
        for name, adapted in contestants.items()
    }
    try:
        for way in ways.values():
            way.engine.start()
        yield ways
    finally:
        for way in ways.values():
            way.engine.stop(0)


class Counts:
    """Different adapters in each step, and different experts in each forward of a layer."""

    def __init__(self, way: Way):
        self.way = way
        self.adapters: list[int] = []
        self.experts: list[int] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        """While it is on, steps are slower."""
        model = self.way.served.model
        hooks = [model.register_forward_pre_hook(self._step)]
        try:
            layers = [(layer.name, layer.module) for layer in find_layers(model).values()]
        except TargetError:
            layers = []
        hooks += [module.register_forward_pre_hook(partial(self._layer, name)) for name, module in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _step(self, module: nn.Module, args: object) -> None:
        self.adapters.append(len(self.way.engine.manager.rows.last.present))

    def _layer(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        ids = args[1]
        if isinstance(self.way.served, ServedModel) and self.way.served.experts is not None:
            handles = self.way.engine.manager.rows.last.handles
            ids = self.way.served.experts.layers[name].table[handles[:, None], ids]
        self.experts.append(ids.unique().numel())


def counted(way: Way, trace: Sequence[Arrival]) -> tuple[float, float]:
    counts = Counts(way)
    with counts.on():
        way.replay(trace)
    return mean(counts.adapters), mean(counts.experts or [0])


@torch.no_grad()
def check(kind: Kind, base: PreTrainedModel, folders: Sequence[Path], trace: Sequence[Arrival], told: Replayed) -> None:
    """Refuses to time a wrong result: every token is the merged model's own choice, as far as its dtype tells."""
    tolerance = TOLERANCE[str(base.dtype).removeprefix("torch.")]
    others = 0.0
    for arrival, tokens in [*zip(trace, told.tokens, strict=True)][:CHECKED]:
        model = base if arrival.adapter is None else kind.merged(base, folders[arrival.adapter])
        error = _regret(model, arrival, tokens)
        assert error < tolerance, f"adapter {arrival.adapter} says what its merged model would not: {error:.2g}"
        others = max(others, _regret(base, arrival, tokens))
    assert not folders or others > 10 * tolerance, "the adapters change nothing"


def _regret(model: PreTrainedModel, arrival: Arrival, tokens: list[int]) -> float:
    """How far below the largest logit a token's own is at most, in deviations of the logits."""
    ids_1T = torch.tensor([[*arrival.prompt, *tokens]], device=model.device)
    logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, len(arrival.prompt) - 1 : -1].float()
    chosen_T1 = logits_TV.gather(1, ids_1T[0, len(arrival.prompt) :, None])
    return float(((logits_TV.amax(1, keepdim=True) - chosen_T1) / logits_TV.std()).max())


def attach(way: Way, served: ServedModel, folders: Sequence[Path]) -> None:
    """Those that are not resident yet."""
    with way.engine.paused():
        for folder in folders[len(way.handles) :]:
            way.handles.append(served.attach(served.read(str(folder))))
