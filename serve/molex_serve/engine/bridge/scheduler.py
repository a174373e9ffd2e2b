"""Transformers' first-come-first-served scheduler, with places for a few adapters and with requests that leave."""

from collections.abc import Callable

from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from molex_serve.engine.bridge.rows import live_of
from molex_serve.engine.roster import Live
from molex_serve.engine.scheduler import Places

NAME = "molex_fair"  # transformers finds a scheduler's class by its name


class FairScheduler(FIFOScheduler):
    """First come, first served, as far as there are places for different adapters."""

    places: Places
    begin: Callable[[Live], None]
    leave: Callable[[Live], None]

    def clear_cancelled_requests(self) -> list[RequestState]:
        for state in (*self.active_requests.values(), *self.waiting_requests.values()):
            if live_of(state).leaving:
                self.set_request_cancellation(state.request_id)
        gone = super().clear_cancelled_requests()
        for state in gone:
            state.status = RequestStatus.FINISHED  # or a step in flight would go on with its pages
            self.block_new_requests = False  # set until one finishes: now it may be this one
            self.leave(live_of(state))
        return gone

    def schedule_batch(
        self, token_budget: int, cache_budget: int
    ) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        self.places.begin_step()
        batch = super().schedule_batch(token_budget, cache_budget)
        scheduled = batch[0] or []
        scheduled.sort(key=_handle)  # in the order of their slots, tokens of different adapters need not be moved
        for future in scheduled:
            self.begin(live_of(future.state))
        return batch

    def _get_waiting_candidates(self) -> list[RequestState]:
        waiting = super()._get_waiting_candidates()
        running = [live_of(state).request.handle for state in self.active_requests.values()]
        may_start = self.places.may_start(running, [live_of(state).request.handle for state in waiting])
        return [state for state, may in zip(waiting, may_start, strict=True) if may]


def _handle(future: FutureRequestState) -> int:
    return live_of(future.state).request.handle


SCHEDULER_MAPPING[NAME] = FairScheduler
