"""Calls to the other deployments of the application, by Ray's handles. What goes wrong becomes our errors."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from molex_serve.errors import Unavailable
from molex_serve.scale.directory import Directory
from molex_serve.scale.exchange import Call, Head
from molex_serve.scale.ports import Figures, Full
from molex_serve.scale.table import Outcome, Report

logger = logging.getLogger("molex")
ENGINE, DIRECTORY, INGRESS = "Engine", "Directory", "Ingress"
ALL_SECONDS = 300.0  # for what every replica is asked to do: reading a large adapter may take a while
ALIASES_SECONDS = 1.0
LOST = (RayActorError, DeploymentUnavailableError)


class RayAnswer:
    """A replica's answer while it comes."""

    def __init__(self, parts: "DeploymentResponseGenerator[Head | bytes]"):
        self._parts, self._ended = parts, False

    async def __anext__(self) -> Head | bytes:
        try:
            return await self._parts.__anext__()
        except BaseException as error:
            self._ended = not isinstance(error, asyncio.CancelledError)
            if isinstance(error, BackPressureError):
                raise Full("every replica is full, and so is the queue before them; ask again") from error
            if isinstance(error, LOST):
                raise Unavailable("the replica that worked on this was lost; ask again") from error
            raise

    def cancel(self) -> None:
        if not self._ended:
            self._ended = True
            self._parts.cancel()


class RayEngines:
    def __init__(self, handle: DeploymentHandle):
        self._handle = handle

    def ask(self, call: Call, key: str) -> RayAnswer:
        parts = self._handle.options(method_name="ask", stream=True, multiplexed_model_id=key).remote(call)
        assert isinstance(parts, DeploymentResponseGenerator)
        return RayAnswer(parts)

    async def reports(self, method: str, *args: object) -> Sequence[Report]:
        """Of every replica that runs."""
        lost = Report(error=Unavailable("this replica was lost; another one takes its place"))
        return [answer if isinstance(answer, Report) else lost for answer in await self._all(method, *args)]

    async def figures(self) -> Sequence[Figures]:
        """Of every replica that could say them."""
        return [answer for answer in await self._all("figures") if isinstance(answer, Figures)]

    async def running(self) -> int:
        """How many replicas there are, as Serve sees it: asking them would wait where they are full."""
        status = await asyncio.to_thread(serve.status)
        states = status.applications[self._handle.app_name].deployments[ENGINE].replica_states
        return sum(number for state, number in states.items() if state == "RUNNING")

    async def _all(self, method: str, *args: object) -> list[Any]:
        try:
            asked = self._handle.broadcast(method, *args)
            answers = await asked.results_async(timeout_s=ALL_SECONDS, return_exceptions=True)
        except (*LOST, TimeoutError) as error:
            raise Unavailable("no replica runs, or one does not answer; ask again") from error
        for error in answers:
            if isinstance(error, Exception):
                logger.warning("a replica did not answer `%s`: %s", method, error)
        return answers


class RayDirectory:
    def __init__(self, handle: DeploymentHandle):
        self._handle = handle

    async def load(self, alias: str, path: str, expected_generation: str | None, pin: bool) -> Outcome:
        return await self._call("load", None, alias, path, expected_generation, pin)

    async def unload(self, alias: str, expected_generation: str | None) -> Outcome:
        return await self._call("unload", None, alias, expected_generation)

    async def aliases(self) -> frozenset[str]:
        return await self._call("aliases", ALIASES_SECONDS)

    async def _call(self, method: str, seconds: float | None, *args: object) -> Any:
        try:
            return await asyncio.wait_for(_answer(self._handle, method, *args), seconds)
        except (*LOST, TimeoutError) as error:
            raise Unavailable("the directory of adapters does not answer; ask again") from error


async def _answer(handle: DeploymentHandle, method: str, *args: object) -> Any:
    return await handle.options(method_name=method).remote(*args)


class DirectoryReplica(Directory):
    """The directory as a deployment."""

    def __init__(self, adapters: Mapping[str, str]):
        super().__init__(adapters, RayEngines(serve.get_deployment_handle(ENGINE)))


def connect() -> tuple[RayEngines, RayDirectory]:
    """The others, from inside of a replica of the same application."""
    return RayEngines(serve.get_deployment_handle(ENGINE)), RayDirectory(serve.get_deployment_handle(DIRECTORY))
