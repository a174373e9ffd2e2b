"""Steps that are prepared while the one before is computed: its tokens are not known yet, its requests may be over.

This is for GPUs. Here a processor plays one: steps are computed at once, and what comes out is read a step later.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.generation.continuous_batching import continuous_api, input_outputs, model_runner, offloading_manager

from molex.workbench.tokenizer import EOS, VOCABULARY_SIZE
from molex_serve.engine.base import Request, Sampling
from molex_serve.engine.continuous import ContinuousEngine
from molex_serve.model.served import ServedModel
from tests.models import tiny
from tests.serve.adapters_of import own_model, save_mixture
from tests.serve.engine.serving import (
    CHUNKED,
    CRAMPED,
    ROOMY,
    SECONDS,
    Adapted,
    greedy,
    mixed,
    prompt,
    running,
    serve,
    submit,
    tokenizer,
)
from tests.serve.engine.test_grammar import asking, conforms


class Fake:
    """A stream, or an event on one, of a device that is never behind."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def record_event(self, event: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...


@pytest.fixture(autouse=True)
def cpu_plays_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_outputs.ContinuousBatchingAsyncIOs, "_supported_device_types", ("cpu",))
    monkeypatch.setattr(input_outputs, "create_device_stream", Fake)
    monkeypatch.setattr(torch, "Event", Fake)
    for module in (continuous_api, input_outputs, model_runner, offloading_manager):
        monkeypatch.setattr(module, "stream_context", lambda stream: nullcontext())


def overlapping(adapted: Adapted, settings: object) -> ContinuousEngine:
    engine = adapted.engine(settings, overlap=True)
    ios = engine.manager.batch_processor.inputs_and_outputs
    assert isinstance(ios, input_outputs.ContinuousBatchingAsyncIOs)
    return engine


@pytest.mark.parametrize("settings", [ROOMY, CHUNKED, CRAMPED], ids=["roomy", "chunked", "cramped"])
def test_mixed_batch_equals_each_adapter_alone(settings: object) -> None:
    adapted, requests = Adapted(), mixed(9, new=14)
    with running(overlapping(adapted, settings)) as engine:
        found = serve(engine, requests) + serve(engine, requests)
        assert engine.stats().prefix_hits > 0
        assert engine.stats().cache_free == engine.stats().cache_total
    assert found == 2 * [adapted.generate(request) for request in requests]


def test_fresh_starts_while_a_step_is_in_flight() -> None:
    adapted, requests = Adapted(), mixed(8, new=20)
    with running(overlapping(adapted, replace(CRAMPED, prefix_cache=False))) as engine:
        found = serve(engine, requests)
    once = sum(len(request.prompt_ids) + request.sampling.max_tokens for request in requests)
    assert adapted.num_fed > once, "nothing was preempted: this test shows nothing"
    assert found == [adapted.generate(request) for request in requests]


def test_first_passes(tmp_path: Path) -> None:
    save_mixture("xlora", tiny("llama"), tmp_path)
    served = ServedModel(tiny("llama"))
    xlora = served.attach(served.read(str(tmp_path / "xlora"), two_passes=True))
    requests = [greedy(str(i), 3 + 5 * i % 29, xlora * (i % 3 > 0), new=14, seed=i) for i in range(8)]
    models = {0: tiny("llama"), xlora: own_model("xlora", tmp_path)}
    with running(ContinuousEngine(served, tokenizer(), replace(CRAMPED, two_passes=True), overlap=True)) as engine:
        found = serve(engine, requests)
    for request, tokens in zip(requests, found, strict=True):
        ids = torch.tensor([request.prompt_ids])
        with torch.no_grad():
            whole = models[request.handle].generate(ids, max_new_tokens=14, do_sample=False)  # type: ignore[operator]
        assert tokens == whole[0, ids.shape[1] :].tolist()


def test_draws_and_logprobs_as_without_overlap() -> None:
    """Penalties and grammars need the token that is in flight, log-probabilities come a step later."""
    samplings = [
        Sampling(max_tokens=20, temperature=0, repetition_penalty=1.4, frequency_penalty=0.7, logprobs=2),
        Sampling(max_tokens=20, temperature=1.3, top_k=20, presence_penalty=1.0, seed=4, logprobs=0),
        Sampling(max_tokens=20, temperature=0, logit_bias={9: 3.0}),
    ]
    requests = [
        Request(id=str(i), prompt_ids=prompt(5 + 7 * i, i), sampling=sampling, handle=i, generation=str(i))
        for i, sampling in enumerate(samplings)
    ]
    results = []
    for overlap in (True, False):
        for settings in (CHUNKED, replace(CRAMPED, cache_tokens=64, prefix_cache=False)):
            with running(Adapted().engine(settings, overlap=overlap)) as engine:
                listeners = [listener.wait() for listener in submit(engine, requests)]
            logprobs = [[x.token_id for event in one.events for x in event.logprobs] for one in listeners]
            assert logprobs[:2] == [one.tokens for one in listeners[:2]]
            results.append([one.tokens for one in listeners])
    assert results == results[:1] * 4


def test_grammar() -> None:
    adapted = Adapted(model=tiny("llama", vocab_size=VOCABULARY_SIZE, max_position_embeddings=128, eos_token_id=EOS))
    with running(overlapping(adapted, replace(CRAMPED, cache_tokens=112))) as engine:
        answers = serve(engine, [asking(str(i), seed=i, temperature=i % 2) for i in range(4)])
    assert all(conforms(answer) for answer in answers)


def test_cancel_in_flight() -> None:
    adapted = Adapted()
    requests = [greedy(str(i), 4 + i, i, new=50) for i in range(6)]
    with running(overlapping(adapted, CHUNKED)) as engine:
        listeners = submit(engine, requests)
        for gone in listeners[:5]:
            assert gone.started.wait(SECONDS)
            engine.cancel(str(listeners.index(gone)))
        assert listeners[5].wait().tokens == adapted.generate(requests[5])
        assert {listener.wait().reason for listener in listeners[:5]} <= {"cancelled", "length"}
        serve(engine, [greedy("next", 5)])
        assert engine.stats().cache_free == engine.stats().cache_total


def test_longest_request_is_served_to_its_last_token() -> None:
    adapted = Adapted()
    requests = [greedy(str(i), length, i, new=32 - length) for i, length in enumerate((1, 31, 16))]
    with running(overlapping(adapted, replace(CRAMPED, cache_tokens=32))) as engine:
        assert serve(engine, requests) == [adapted.generate(request) for request in requests]


def test_pause_and_stop() -> None:
    adapted = Adapted()
    engine = overlapping(adapted, CHUNKED)
    engine.start()
    listeners = submit(engine, mixed(4, new=20))
    assert listeners[0].started.wait(SECONDS)
    assert len(engine.score(prompt(6), 1, None, 0)) == 5
    engine.stop(SECONDS)
    assert [listener.tokens for listener in listeners] == [adapted.generate(request) for request in mixed(4, new=20)]
