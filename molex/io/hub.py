"""Where files are that a user names: a folder here, or a snapshot of it from the hub, by transformers' own means."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers.utils.hub import cached_files

from molex.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def local_folder(path: str | Path, files: Sequence[str], expected: str, revision: str | None = None) -> Path:
    """The folder itself, or one with these files of a hub repository. expected: what the caller takes, for the error.

    Raises CheckpointError where it is neither.
    """
    if not isinstance(path, str | Path):
        raise CheckpointError(f"{path!r} is no path; {expected}, or a hub id")
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not isinstance(path, str) or not _HUB_ID.fullmatch(path):
        kind = "a file" if folder.exists() else "no folder"
        raise CheckpointError(f"{path} is {kind}; {expected}, or a hub id")
    try:
        found = cached_files(path, list(files), revision=revision)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is no folder here, nor does the hub give it ({reason}); {expected}") from error
    assert found is not None
    return Path(found[0]).parent


def source_of(model: nn.Module) -> str:
    """The folder or hub id that a model came from; "" where it was made in memory."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
