"""One engine of the cluster: a whole server in this process, without its sockets.

Ray's multiplexing only remembers here which adapters this replica served lately, so that requests for them come to it
again: as many as its device has places for, the least recently used forgotten. Where an adapter is remains the
registry's business: each request takes its lease there, as in a single process. A lease that Ray kept would hold an
adapter's place through an unload, and against those who wait for one. So the key is the alias alone: a reload brings
the new generation to every replica before it is named, and the alias stays where its requests went.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from molex_serve.errors import ServeError
from molex_serve.http.metrics import Metrics
from molex_serve.options import Start
from molex_serve.scale.exchange import Call, Head, exchange
from molex_serve.scale.ports import Figures
from molex_serve.scale.table import Report, Table, first_table

logger = logging.getLogger("molex")
NEWS_SECONDS = 2.0  # how long a replica that missed a change may go on without it


class Replica:
    """adapters: what `given` names, as the directory starts with them. Ready once `check_health` has returned."""

    def __init__(self, given: Start, adapters: Mapping[str, str], directory: DeploymentHandle):
        from molex_serve.scale.following import Follower  # not above: who deploys this needs no torch
        from molex_serve.starting import prepare

        self._assembly = prepare(given, adapters)
        self._metrics: Metrics = self._assembly.app.state.face.metrics
        self._follower = Follower(
            serve.get_replica_context().replica_tag,
            self._assembly.registry,
            first_table(adapters),
            self._assembly.served.read,
            given.adapter_root,
            self._metrics.forget,
        )
        self._changing = asyncio.Lock()
        self._directory = directory
        self._remember: Any = serve.multiplexed(max_num_models_per_replica=given.resident)(remember)
        self._life = self._assembly.app.router.lifespan_context(self._assembly.app)
        self._begun = asyncio.ensure_future(self._begin())

    async def ask(self, call: Call) -> AsyncIterator[Head | bytes]:
        """A request through the application."""
        alias = serve.get_multiplexed_model_id()
        if alias in self._follower.table.entries:
            await self._remember(alias)
        async with aclosing(exchange(self._assembly.app, call)) as parts:
            async for part in parts:
                yield part

    async def check_health(self) -> None:
        """Ray puts another replica in the place of one that raises here."""
        await asyncio.shield(self._begun)
        if not self._assembly.engine.alive():
            raise RuntimeError("the engine has stopped")

    async def stage(self, alias: str, path: str, pin: bool, serial: int) -> Report:
        async with self._changing:
            return await asyncio.to_thread(self._follower.stage, alias, path, pin, serial)

    async def follow(self, table: Table) -> Report:
        async with self._changing:
            return await asyncio.to_thread(self._follower.follow, table)

    async def holdings(self) -> Report:
        return await asyncio.to_thread(self._follower.holdings)

    async def figures(self) -> Figures:
        text = await asyncio.to_thread(self._metrics.text)
        return Figures(self._follower.name, text.decode())

    async def _begin(self) -> None:
        await self._life.__aenter__()
        await self._catch_up()
        self._keeping_up = asyncio.ensure_future(self._keep_up())

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(NEWS_SECONDS)
            try:
                await self._catch_up()
            except (RayError, RayServeException, ServeError) as error:
                logger.warning("adapters here may not be what the others serve; tried again soon: %s", error)

    async def _catch_up(self) -> None:
        await self.follow(await self._directory.newest.remote(self._follower.table))


async def remember(alias: str) -> str:
    """What Ray keeps of an adapter."""
    return alias
