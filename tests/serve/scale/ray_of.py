"""The commands of docs/serving_at_scale.md, on a Ray of this test's own."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

PAGE = (Path(__file__).parents[3] / "docs" / "serving_at_scale.md").read_text()
BLOCKS = [block for block in PAGE.split("```")[1::2] if block.startswith("\n")]
INSTALL, MOLEX, HEAD, JOIN, DEPLOY, STATUS, SHUTDOWN = [line for block in BLOCKS for line in block.strip().splitlines()]
CONFIGURATION = PAGE.split("```yaml\n")[1].split("```")[0]
SECONDS = 600.0  # for what takes a moment on an idle machine


class Processes:
    """Commands and the Ray that they share. All that they start is gone at the end."""

    def __init__(self) -> None:
        self.rays = tempfile.mkdtemp(prefix="molex-ray-", dir="/tmp")  # paths of sockets must be short
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_TMPDIR": self.rays,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._started: dict[str, psutil.Popen] = {}
        self._children: list[psutil.Process] = []

    def run(self, command: str, folder: Path) -> str:
        done = subprocess.run(
            shlex.split(command), cwd=folder, env=self.environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]} {done.stderr[-3000:]}"
        return done.stdout

    def start(self, command: str, ready: str, folder: Path | None = None) -> None:
        """Goes on when it has said so."""
        log = Path(self.rays) / f"{len(self._started)}.log"
        with log.open("w") as file:
            process = psutil.Popen(
                shlex.split(command), cwd=folder, env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )
        self._started[command] = process
        until(lambda: ready in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()[-5000:]

    def names(self) -> list[str]:
        """Of what runs."""
        return [" ".join(one.cmdline()) for one in self._running()]

    def tell_to_stop(self, command: str) -> None:
        process = self._started[command]
        self._children = process.children(recursive=True)
        process.send_signal(signal.SIGTERM)

    def wait_until_stopped(self, command: str) -> None:
        """Nothing that it had started when it was told to stop may be left."""
        assert self._started.pop(command).wait(SECONDS) == 0
        _, left = psutil.wait_procs(self._children, SECONDS)
        assert not left

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        found = self._running()
        for one in found:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(found, SECONDS)
        shutil.rmtree(self.rays, ignore_errors=True)

    def _running(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in self._started.values():
            with suppress(psutil.NoSuchProcess):
                found += [*process.children(recursive=True), process]
        return found


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [one.getsockname()[1] for one in sockets]
