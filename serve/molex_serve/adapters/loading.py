"""Which kind of adapter a folder is, and reading it: whatever is wrong with it is one error that says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from molex.errors import MolexError
from molex.esft.files import CONFIG_FILE as ESFT_FILE
from molex.io.peft import CONFIG_FILE as PEFT_FILE
from molex.io.record import CONFIG_FILE as MOLEX_FILE
from molex_serve.adapters.base import HostAdapter
from molex_serve.adapters.blend import BLEND_FILE, read_blend
from molex_serve.adapters.esft import read_esft
from molex_serve.adapters.lora import read_lora
from molex_serve.adapters.mixture import read_mixture
from molex_serve.errors import BadAdapter, ServeError

Reader = Callable[[Path, Any], HostAdapter]

# the file that tells the kind -> its reader
READERS: dict[str, Reader] = {
    MOLEX_FILE: read_mixture,
    BLEND_FILE: read_blend,
    PEFT_FILE: read_lora,
    ESFT_FILE: read_esft,
}


def read(path: str | Path, model: PreTrainedModel) -> HostAdapter:
    """Reads a folder and checks it against the base. Raises BadAdapter; the base is as it was."""
    folder = Path(path)
    if not folder.is_dir():
        raise BadAdapter(f"{folder} is no folder; give one that PEFT, molex or ESFT wrote, or one with a {BLEND_FILE}")
    reader = next((reader for file, reader in READERS.items() if (folder / file).is_file()), None)
    if reader is None:
        raise BadAdapter(f"{folder} is no adapter: it has none of {', '.join(READERS)}")
    try:
        return reader(folder, model)
    except ServeError:
        raise
    except MolexError as error:
        raise BadAdapter(str(error)) from error
