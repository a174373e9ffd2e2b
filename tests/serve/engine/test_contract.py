"""What `molex_serve.engine.bridge` knows about the inside of transformers, one by one, so that drift is named.

A new release of transformers: run these, mend the bridge where they fail, then widen the range in `upstream.py`.
"""

import inspect
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers.generation.continuous_batching import (
    cache,
    continuous_api,
    input_outputs,
    model_runner,
    scheduler,
    utils,
)
from transformers.generation.continuous_batching.cache_allocators import cache_allocator
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
    RequestState,
    RequestStatus,
)

from molex.errors import BackendError
from molex_serve.engine.bridge.manager import Manager
from molex_serve.engine.bridge.rows import SteppedModel, live_of
from molex_serve.engine.bridge.scheduler import NAME, FairScheduler
from molex_serve.engine.roster import Live
from molex_serve.engine.upstream import require_tested
from tests.serve.engine.serving import CHUNKED, Adapted, Listener, greedy

SIGNATURES: dict[Any, list[str]] = {
    ContinuousBatchingLogitsProcessorList.fill_defaults: ["self", "int32_tensor"],
    ContinuousBatchingLogitsProcessorList.prepare_tensor_args: ["self", "requests_in_batch", "arg_storage"],
    ContinuousBatchingLogitsProcessorList.__call__: ["self", "input_ids", "scores", "logits_processor_args"],
    ContinuousBatchingLogitsProcessorList.check_kwargs: ["self", "kwargs"],
    continuous_api.OutputRouter.deliver: ["self", "output"],
    continuous_api.OutputRouter.deliver_batch: ["self", "outputs"],
    continuous_api.OutputRouter.fail_and_deliver: ["self", "state", "error"],
    continuous_api.ContinuousBatchProcessor._generation_step: ["self", "model"],
    continuous_api.ContinuousBatchingManager._generation_step: ["self"],
    continuous_api.ContinuousBatchingManager._create_batch_processor: ["self"],
    continuous_api.ContinuousBatchingManager._run_generation_loop: ["self"],
    continuous_api.ContinuousBatchingManager.__init__: [
        *("self", "model", "generation_config", "continuous_batching_config", "workload_hints")
    ],
    scheduler.Scheduler.__init__: ["self", "cache", "safety_margin", "max_requests_per_batch"],
    scheduler.FIFOScheduler.schedule_batch: ["self", "token_budget", "cache_budget"],
    scheduler.FIFOScheduler._get_waiting_candidates: ["self"],
    scheduler.FIFOScheduler.clear_cancelled_requests: ["self"],
    scheduler.FIFOScheduler.set_request_cancellation: ["self", "request_id"],
    cache.PagedAttentionCache.search_prefix_match: ["self", "request_id", "prompt_ids"],
    cache.PagedAttentionCache.mark_complete_blocks: ["self", "state", "complete_blocks"],
    cache.PagedAttentionCache.update: ["self", "key_states", "value_states", "layer_idx", "kwargs"],
    cache.PagedAttentionCache.compute_free_capacity: ["self", "relative"],
    cache_allocator.CacheAllocator.register_cache_tensor: [
        *("self", "bytes_per_sector", "non_trash_bytes", "cache_tensor", "pool")
    ],
    cache_allocator.compute_block_hash: ["parent_hash", "tokens"],
    model_runner.infer_max_single_request_tokens: ["cache"],
    utils.attn_mask_is_needed: ["config"],
    model_runner.ModelRunner.supports_logits_to_keep: ["self", "model"],
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signatures(function: Any) -> None:
    assert list(inspect.signature(function).parameters) == SIGNATURES[function]


@pytest.fixture
def manager() -> Manager:
    return Adapted().engine(CHUNKED).manager


def states(*lengths: int) -> list[RequestState]:
    requests = [greedy(str(i), length, i + 1, task=i) for i, length in enumerate(lengths)]
    lives = [Live(request, Listener(), frozenset(), seed=i, key=str(i)) for i, request in enumerate(requests)]
    return [
        RequestState(live.key, list(live.request.prompt_ids), logit_processor_kwargs={"live": live}) for live in lives
    ]


def test_other_releases_are_refused() -> None:
    require_tested(transformers.__version__)
    require_tested("5.23.7")
    for version in ("5.22.1", "5.24.0", "5.24.0.dev0", "6.0"):
        with pytest.raises(BackendError, match=r"tested with transformers 5\.23"):
            require_tested(version)


def test_our_parts_are_in_their_places(manager: Manager) -> None:
    processor = manager.batch_processor
    assert processor is not None
    assert scheduler.SCHEDULER_MAPPING[NAME] is FairScheduler
    assert type(processor.scheduler) is FairScheduler
    assert processor.logit_processor is processor.model_runner.logit_processor is manager.rows
    assert processor.output_router is manager.output_router
    assert processor.scheduler.cache is processor.cache
    assert not processor.model_runner.do_sample
    assert not processor.model_runner.pad_inputs
    assert "molex" not in scheduler.SCHEDULER_MAPPING["fifo"].__module__


def test_engines_share_no_state() -> None:
    first, second = (Adapted().engine(CHUNKED).manager.batch_processor for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.scheduler.places is not second.scheduler.places
    assert first.cache.search_prefix_match is not second.cache.search_prefix_match
    assert cache.PagedAttentionCache.search_prefix_match.__module__.startswith("transformers")


def test_a_second_cache_lies_under_the_same_pages() -> None:
    """And nothing moves pages without it: they are copied for forks and to the host's memory alone."""
    manager = Adapted().engine(replace(CHUNKED, two_passes=True)).manager
    processor = manager.batch_processor
    assert processor is not None
    ours, first = processor.cache, manager.stepped.first_cache
    assert first is not None
    index = torch.arange(60, 63)
    inputs: dict[str, Any] = {"read_index": [index], "write_index": [index]}
    for layer in range(2):
        rows = torch.full((1, 2, 3, 8), layer + 1.0)
        given = {**inputs, "cu_seq_lens_k": {"full_attention": index}, "max_length_k": {"full_attention": 3}}
        keys, values = first.update(rows, -rows, layer, given)
        assert torch.equal(keys, rows)
        assert torch.equal(values, -rows)
    assert not ours.cache_tensor.any()
    assert len(first.cache_tensor.view(torch.float32).nonzero()) == 2 * 2 * rows.numel()
    assert first.cache_allocators["full_attention"].block_table is ours.cache_allocators["full_attention"].block_table
    assert processor.cb_config.cpu_offload_space == 0
    assert "num_children" not in inspect.getsource(Manager)


def test_settings_of_a_request_survive_forks_and_fresh_starts() -> None:
    (state,) = states(5)
    state.generated_tokens = [7, 8]
    anew = state.create_equivalent_initial_request()
    assert live_of(anew) is live_of(state) is live_of(state.fork("child")) is live_of(deepcopy(state))
    assert anew.initial_tokens == [*state.initial_tokens, 7, 8]
    assert anew.to_generation_output().generated_tokens == [7, 8]


def test_rows_see_all_requests_of_a_step_in_order(manager: Manager) -> None:
    """With their tokens already counted, in a tensor of which the model gets a view."""
    processor = manager.batch_processor
    assert processor is not None
    for state in states(3, 4, 9):
        processor.scheduler.add_waiting_request(state)
    assert processor.prepare_next_batch()
    inputs = processor.inputs_and_outputs.get_model_kwargs()
    rows = inputs["logits_processor_args"]
    step = manager.rows.step(rows, inputs["input_ids"].shape[1])
    assert step.handles.tolist() == [1] * 3 + [2] * 4 + [3]
    assert [(span.handle, span.start, span.stop, span.task) for span in step.spans] == [
        *((1, 0, 3, 0), (2, 3, 7, 1), (3, 7, 8, 2))
    ]
    assert rows._base is processor.inputs_and_outputs._bulk_input_tensor
    assert rows.shape[0] == manager.rows.tensors_required
    assert rows._base.dtype == torch.int32
    assert inputs["logits_indices"].tolist()[:2] == [2, 6]
    assert [row.position for row in manager.rows._rows] == [3, 4]  # the third's prompt is not over
    assert "logits_to_keep" not in inputs  # the runner adds it, where the model can
    assert processor.model_runner.supports_logits_to_keep(manager.stepped)


def test_outputs_are_cumulative_and_tell_their_end() -> None:
    (state,) = states(3)
    state.max_new_tokens = state._new_tokens_limit = 2
    state.streaming = True
    state.status = RequestStatus.DECODING
    assert not state.update_and_check_completion(5, None)
    assert state.to_generation_output().generated_tokens == [5]
    assert not state.to_generation_output().is_finished()
    assert state.update_and_check_completion(6, None)
    output = state.to_generation_output()
    assert isinstance(output, GenerationOutput)
    assert output.generated_tokens == [5, 6]
    assert output.is_finished()
    assert state.status == RequestStatus.FINISHED
    assert FutureRequestState.__slots__ == ("state", "has_new_token", "complete_blocks", "query_length")


def test_blocks_are_known_by_the_hash_of_the_first() -> None:
    """A chain: a number in the place of the first token changes every block's name."""
    salted, plain = [cache_allocator.compute_block_hash(None, [first, 4, 4, 4]) for first in (-2, 4)]
    assert salted != plain
    assert cache_allocator.compute_block_hash(salted, [1] * 4) != cache_allocator.compute_block_hash(plain, [1] * 4)


def test_a_finished_request_of_a_step_in_flight_is_skipped() -> None:
    source = inspect.getsource(continuous_api.ContinuousBatchProcessor.update_batch)
    assert "if state.status in (RequestStatus.FINISHED, RequestStatus.PENDING):" in source
    assert "_generation_step(self.stepped)" in inspect.getsource(Manager._generation_step)
    assert issubclass(SteppedModel, torch.nn.Module)


def test_rows_of_a_step_travel_to_the_device_in_one_tensor() -> None:
    source = inspect.getsource(input_outputs.ContinuousBatchingIOs._transfer_inputs)
    assert "other._bulk_input_tensor.copy_(self._bulk_input_tensor" in source


def test_who_lost_a_place_gets_it_back_when_the_last_one_leaves(manager: Manager) -> None:
    """Transformers admits nobody after a preemption until a request finishes; one that is cancelled never does."""
    processor = manager.batch_processor
    assert processor is not None
    runs, waits = states(3, 4)
    processor.scheduler.add_waiting_request(runs)
    assert processor.prepare_next_batch()
    processor.scheduler.add_waiting_request(waits)
    processor.scheduler.block_new_requests = True
    live_of(runs).leaving = True
    assert processor.prepare_next_batch()
    assert list(processor.scheduler.active_requests) == [waits.request_id]
    assert runs.status == RequestStatus.FINISHED
