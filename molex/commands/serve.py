"""molex serve: one base and many adapters of every kind behind OpenAI's HTTP API."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molex.commands.console import console
from molex.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from molex_serve.options import Start


def serve(
    model: Annotated[str, typer.Option(help="The base: a folder or hub id.")] = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of a PEFT LoRA, molex mixture or ESFT adapter, or NAME=law:0.6+code:0.4."),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The workbench's model and adapters, made once.")] = False,
    out: Annotated[Path, typer.Option(help="Where --demo keeps its adapters.")] = Path("runs/serve"),
    host: str = "127.0.0.1",
    port: int = 8000,
    name: Annotated[str, typer.Option(help="What clients call the base.")] = "base",
    api_key: Annotated[str | None, typer.Option(envvar="MOLEX_API_KEY", help="Asked of every client.")] = None,
    admin_key: Annotated[str | None, typer.Option(envvar="MOLEX_ADMIN_KEY", help="To load and unload.")] = None,
    adapter_root: Annotated[Path | None, typer.Option(help="The folder adapters may be loaded from over HTTP.")] = None,
    resident: Annotated[int, typer.Option(min=1, help="Adapters on the device at once.")] = 32,
    cache_tokens: Annotated[int, typer.Option(min=64, help="Tokens that the KV cache holds.")] = 16384,
    dtype: Annotated[str, typer.Option(help="Of the base: auto, float32, bfloat16, float16.")] = "auto",
    two_passes: Annotated[bool, typer.Option("--two-passes", help="A second cache, which xlora takes.")] = False,
    static: Annotated[bool, typer.Option("--static", help="One request after another, without paging.")] = False,
    replicas: Annotated[int, typer.Option(min=0, help="Engines under Ray, one a GPU; 0: this process, no Ray.")] = 0,
) -> None:
    """Serve a base and its adapters over HTTP."""
    from molex_serve.options import Start

    if bool(model) == demo:
        raise ConfigError("give a base with --model, or --demo")
    try:
        begin = _starter(replicas)
    except ImportError as error:
        extra = "ray" if replicas else "serve"
        raise BackendError(f"molex serve needs more packages: pip install 'molex[{extra}]' ({error})") from error
    given = Start(
        model=model,
        adapters=adapter or [],
        demo=out if demo else None,
        host=host,
        port=port,
        name=name,
        api_key=api_key,
        admin_key=admin_key,
        adapter_root=None if adapter_root is None else str(adapter_root),
        resident=resident,
        cache_tokens=cache_tokens,
        dtype=dtype,
        two_passes=two_passes,
        static=static,
    )
    begin(given, console.print)


def _starter(replicas: int) -> "Callable[[Start, Callable[[str], object]], None]":
    """Raises ImportError where its packages are missing."""
    if not replicas:
        from molex_serve.starting import start

        return start
    from molex_serve.scale.settings import Scaling
    from molex_serve.scale.starting import start as start_cluster

    return partial(start_cluster, Scaling(replicas=replicas))
