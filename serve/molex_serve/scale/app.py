"""The Ray Serve application: `serve run molex_serve.scale.app:build model=... replicas=2`, or `import_path` in a
configuration, with the same arguments."""

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from molex.errors import ConfigError
from molex_serve.options import Start, named, server_settings
from molex_serve.scale.cluster import DIRECTORY, ENGINE, INGRESS, DirectoryReplica, connect
from molex_serve.scale.ingress import maker
from molex_serve.scale.replica import Replica
from molex_serve.scale.settings import Arguments, Scaling

logger = logging.getLogger("molex")
NO_LIMIT = 1 << 20  # what an ingress and the directory work on at once: the engines' limits are those that count
STOPPING_SECONDS = 0.2  # how often a replica that is to stop looks whether its requests are done


def build(arguments: Arguments) -> Application:
    """What Ray Serve calls. Raises ConfigError where there is no base, or two."""
    if bool(arguments.model) == (arguments.demo is not None):
        raise ConfigError("give a base with `model`, or a folder for the demonstration's adapters with `demo`")
    given = Start(
        **arguments.model_dump(exclude={"adapters", *(field.name for field in fields(Scaling))}),
        adapters=[f"{alias}={source}" for alias, source in arguments.adapters.items()],
        host="",
        port=0,
    )
    scaling = Scaling(**arguments.model_dump(include={field.name for field in fields(Scaling)}))
    return application(given, scaling, logger.info)


def application(given: Start, scaling: Scaling, say: Callable[[str], object]) -> Application:
    """given: of every engine; its host and port are not used."""
    adapters, given = adapters_of(given, say), at_home(given)
    settings = server_settings(given)
    stopping: dict[str, Any] = {
        "graceful_shutdown_timeout_s": settings.drain_seconds,
        "graceful_shutdown_wait_loop_s": STOPPING_SECONDS,
    }
    directory = serve.deployment(
        DirectoryReplica,
        name=DIRECTORY,
        max_ongoing_requests=NO_LIMIT,
        ray_actor_options=idle(),
        logging_config={"enable_access_log": False},  # every engine asks for news, again and again
    ).bind(adapters)
    engine = serve.deployment(Replica, name=ENGINE, **engines(scaling), **stopping).bind(given, adapters, directory)
    face = serve.ingress(maker(connect, settings))()
    return serve.deployment(
        face,
        name=INGRESS,
        num_replicas=scaling.ingress_replicas,
        max_ongoing_requests=NO_LIMIT,
        ray_actor_options=idle(),
        **stopping,
    ).bind(engine, directory)


def adapters_of(given: Start, say: Callable[[str], object]) -> dict[str, str]:
    """A source for each alias. Only to make the demonstration's is there need of torch here."""
    adapters = named(given.adapters)
    if given.demo is not None:
        from molex_serve import starting

        adapters = starting.adapters_of(given, say)
    return {alias: absolute(source) for alias, source in adapters.items()}


def engines(scaling: Scaling) -> dict[str, Any]:
    """As Ray Serve has it."""
    gpus = scaling.num_gpus
    if gpus is None:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    count: dict[str, Any] = {"num_replicas": scaling.replicas}
    if scaling.max_replicas is not None:
        count = {
            "autoscaling_config": {
                "min_replicas": scaling.replicas,
                "max_replicas": scaling.max_replicas,
                "target_ongoing_requests": scaling.max_ongoing_requests / 2,
            }
        }
    return {
        **count,
        "ray_actor_options": {"num_cpus": scaling.num_cpus, "num_gpus": gpus},
        "max_ongoing_requests": scaling.max_ongoing_requests,
        "max_queued_requests": scaling.max_queued_requests,
    }


def idle() -> dict[str, Any]:
    """Of a process that mostly waits: it needs no core for itself."""
    return {"num_cpus": 0}


def at_home(given: Start) -> Start:
    """Its paths as any process of this machine finds them."""
    root = None if given.adapter_root is None else absolute(given.adapter_root)
    demo = None if given.demo is None else given.demo.absolute()
    return replace(given, model=absolute(given.model), adapter_root=root, demo=demo)


def absolute(source: str) -> str:
    """A folder that is there, wherever one stands; hub ids and blends as they are."""
    return str(Path(source).absolute()) if source and Path(source).exists() else source
