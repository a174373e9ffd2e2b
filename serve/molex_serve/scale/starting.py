"""`molex serve --replicas N`: the application on Ray, on a cluster where one runs on this machine or RAY_ADDRESS names
one, and else on a Ray of its own, which ends with the command."""

import signal
import threading
from collections.abc import Callable
from types import FrameType

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from molex.errors import ConfigError
from molex_serve.options import Start
from molex_serve.scale.app import application
from molex_serve.scale.settings import Scaling

APPLICATION = "molex"


def start(scaling: Scaling, given: Start, say: Callable[[str], object]) -> None:
    """Returns when it was told to stop, by SIGINT or SIGTERM, and running answers have ended. A second one does not
    wait. Raises ConfigError on port 0: Ray's proxies listen on the same port on every machine."""
    if not given.port:
        raise ConfigError("--replicas takes a --port, the same one on every machine")
    ray.init()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        serve.start(http_options=HTTPOptions(host=given.host, port=given.port))
        serve.run(application(given, scaling, say), name=APPLICATION, route_prefix="/")
        say(f"serving {given.name} by {scaling.replicas} engines on http://{given.host}:{given.port}")
        threading.Event().wait()
    except KeyboardInterrupt:
        say("stopping when running answers have ended")
    finally:
        serve.delete(APPLICATION)
        ray.shutdown()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
