"""The server under the soak, in a process of its own: too small for its load in every respect.

python -m benchmarks.soak.server FOLDER NAME...      (of adapters in it; prints where it listens)
"""

import ctypes
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from molex.workbench import load_base, load_tokenizer
from molex_serve.assembly import Assembly, assemble
from molex_serve.http.server import Server
from molex_serve.settings import AdapterLimits, EngineSettings, ServerSettings

LIMITS = AdapterLimits(resident=4, columns=96, host_bytes=3 << 20, expert_slots=0)
ENGINE = EngineSettings(
    cache_tokens=640, page_tokens=8, step_tokens=48, step_requests=12, step_adapters=3, queue=24, drain_steps=32
)
DRAIN_SECONDS = 20.0
SECONDS = 0.25  # between two times that freed memory is given back
ALIASES = tuple(f"alias-{number}" for number in range(12))


def at_first(names: Sequence[str]) -> dict[str, str]:
    """What is named when the server starts; the other aliases are loaded later."""
    return dict(zip(ALIASES, names, strict=False))


def settings(root: Path) -> ServerSettings:
    return ServerSettings(port=0, adapter_root=str(root), drain_seconds=DRAIN_SECONDS, body_bytes=1 << 16)


def assembled(root: Path, names: Sequence[str]) -> Assembly:
    adapters = {alias: str(root / name) for alias, name in at_first(names).items()}
    return assemble(load_base(), load_tokenizer(), adapters, server=settings(root), engine=ENGINE, limits=LIMITS)


def say_where(server: Server) -> None:
    while not server.started:
        time.sleep(0.01)
    print("http://{}:{}".format(*server.address), flush=True)


def give_back_freed() -> None:
    """So that the process is as large as what it holds, not as what it held at its busiest moment (glibc)."""
    trim = ctypes.CDLL(None).malloc_trim
    while True:
        trim(0)
        time.sleep(SECONDS)


def main() -> None:
    root = Path(sys.argv[1])
    assembly = assembled(root, sys.argv[2:])
    server = Server(assembly.app, settings(root), log_level="warning")
    threading.Thread(target=say_where, args=(server,), daemon=True).start()
    threading.Thread(target=give_back_freed, daemon=True).start()
    try:
        server.run()
    finally:
        assembly.close()


if __name__ == "__main__":
    main()
