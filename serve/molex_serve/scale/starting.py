"""`molex serve --replicas N`: the application on Ray, on a cluster where one runs on this machine or RAY_ADDRESS names
one, and else on a Ray of its own, which ends with the command."""

import signal
import threading

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from molex_serve.scale.app import application
from molex_serve.scale.settings import Scaling
from molex_serve.starting import Say, Start, adapters_of

APPLICATION = "molex"


def start(given: Start, scaling: Scaling, say: Say) -> None:
    """Returns when it was told to stop, by SIGINT or SIGTERM, and running answers are finished."""
    adapters = adapters_of(given, say)
    ray.init()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    serve.start(http_options=HTTPOptions(host=given.host, port=given.port))
    serve.run(application(given, adapters, scaling), name=APPLICATION, route_prefix="/")
    known = f"{given.name} and {len(adapters)} adapters" if adapters else given.name
    say(f"serving {known} by {scaling.replicas} engines on http://{given.host}:{given.port}")
    stopped.wait()
    serve.delete(APPLICATION)
    ray.shutdown()
