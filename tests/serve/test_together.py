"""The first invariant: through the engine a mixed batch of real adapters is each one's own library, token for token."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from molex_serve.engine.base import Request, Sampling
from molex_serve.engine.continuous import ContinuousEngine
from molex_serve.engine.static import StaticEngine
from molex_serve.errors import BadRequest
from molex_serve.model.served import ServedModel
from molex_serve.settings import EngineSettings
from tests.models import tiny
from tests.serve.adapters_of import LORAS, MIXTURES, TASKS, own_model, save_everyone
from tests.serve.engine.serving import CHUNKED, CRAMPED, ROOMY, prompt, running, serve, submit, tokenizer

EVERYONE = ("base", *LORAS, "blend", *MIXTURES)
SETTINGS = {"roomy": ROOMY, "chunked": CHUNKED, "cramped": CRAMPED, "no prefixes": replace(CRAMPED, prefix_cache=False)}
NEW = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_everyone(tmp_path_factory.mktemp("adapters"))


def requests(handles: dict[str, int], names: list[str]) -> list[Request]:
    """Two for each, one of which has a prompt that all adapters share."""
    return [
        Request(
            id=f"{name}, {same}",
            prompt_ids=prompt(13) if same else prompt(3 + 7 * number % 23, seed=number),
            sampling=Sampling(max_tokens=NEW, temperature=0),
            handle=handles.get(name, 0),
            generation=name if name in handles else "",
            task=TASKS.get(name),
        )
        for same in (True, False)
        for number, name in enumerate(names)
    ]


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[int]]:
    """By transformers' generate, on each adapter's own model."""
    found = {}
    for name in EVERYONE:
        model = own_model(name, folder)
        for request in requests({}, list(EVERYONE)):
            if request.id.startswith(f"{name}, "):
                ids = torch.tensor([request.prompt_ids])
                with torch.no_grad():
                    whole = model.generate(ids, max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
                found[request.id] = whole[0, ids.shape[1] :].tolist()
    return found


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_everyone_at_once(settings: EngineSettings, folder: Path, expected: dict[str, list[int]]) -> None:
    served = ServedModel(tiny("llama"))
    read = {name: served.read(str(folder / name), two_passes=True) for name in EVERYONE if name != "base"}
    handles = {name: served.attach(adapter) for name, adapter in read.items()}
    asked = requests(handles, list(EVERYONE))
    engine = ContinuousEngine(served, tokenizer(), replace(settings, two_passes=True))
    with running(engine):
        found = serve(engine, asked)
    for request, tokens in zip(asked, found, strict=True):
        assert tokens == expected[request.id], request.id
    assert len({tuple(expected[request.id]) for request in asked}) > len(EVERYONE), "the adapters do nothing"


@pytest.mark.parametrize("kind", [ContinuousEngine, StaticEngine])
def test_a_task_that_is_none_ends_no_step(kind: type[ContinuousEngine] | type[StaticEngine], folder: Path) -> None:
    """It is refused before it gets there; others go on."""
    served = ServedModel(tiny("llama"))
    name = next(iter(TASKS))
    handle = served.attach(served.read(str(folder / name)))
    good = requests({name: handle}, [name])[0]
    with running(kind(served, tokenizer(), ROOMY)) as engine:
        for task in (None, 99):
            with pytest.raises(BadRequest, match=f"task={task}; this adapter is routed by tasks"):
                submit(engine, [replace(good, id=f"task {task}", task=task)])
            with pytest.raises(BadRequest, match="routed by tasks"):
                engine.score(good.prompt_ids, handle, task, 0)
        assert len(serve(engine, [good])[0]) == NEW
