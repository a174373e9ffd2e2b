"""model.save_pretrained of a converted model: the base under its original names, and the mixture beside it.

Left alone, transformers would write the converted names, and reload a model with newly drawn weights, without an
error. So convert gives the model this object as its own `save_pretrained`: the stock loader then finds exactly the
base in the folder, and `molex.load` the mixture. model.push_to_hub goes through save_pretrained, and so pushes both.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
from torch import Tensor
from transformers import PreTrainedModel

from molex.errors import ConfigError
from molex.io.files import staged
from molex.io.saving import gather, write_mixture
from molex.mixture import Mixture

_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class SavePretrained:
    """Stands in for `PreTrainedModel.save_pretrained` on one model, with its signature. An object, so that a deep copy
    of the model saves the copy's own weights."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        method = inspect.signature(type(self.model).save_pretrained)
        return method.replace(parameters=[*method.parameters.values()][1:])

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Raises ConfigError for distributed_checkpoint=True, StateError where tensors are sharded away."""
        call = self.__signature__.bind(*args, **kwargs)
        call.apply_defaults()
        options = dict(call.arguments)
        extra = options.pop("kwargs")
        directory = Path(options.pop("save_directory"))
        push = options.pop("push_to_hub")
        if options.get("distributed_checkpoint"):
            raise ConfigError("a mixture is saved whole; leave distributed_checkpoint out")
        if options.get("variant"):
            raise ConfigError("molex.load would not find the base's weights under another name; leave variant out")
        written = self._save(directory, options)
        if push and written:
            push_folder(directory, written, options["token"], extra)

    def _save(self, directory: Path, options: dict[str, Any]) -> list[str]:
        """Returns the names of the files written: none on a process that is not the main one."""
        model, mixture = self.model, Mixture.of(self.model)
        state_dict = options.pop("state_dict")
        tensors = gather(mixture, state_dict)
        original = None if state_dict is None else original_names(mixture, state_dict)
        if not options["is_main_process"]:
            with TemporaryDirectory() as nowhere, unconverted(mixture):  # what it gathers, every rank must give
                type(model).save_pretrained(model, nowhere, state_dict=original, **options)
            return []
        with staged(directory) as scratch:
            with unconverted(mixture):
                type(model).save_pretrained(model, scratch, state_dict=original, **options)
            write_mixture(mixture, tensors, scratch, directory, included=True)
            names = [path.name for path in scratch.iterdir()]
        _drop_stale_weights(directory, names)
        return names


@contextmanager
def unconverted(mixture: Mixture) -> Iterator[None]:
    """The model with its base's modules in their old places, for the time of saving it."""
    model = mixture.model
    shared = model._modules.pop("molex", None)
    for name, layer in mixture.layers.items():
        model.set_submodule(name, layer.base)
    try:
        yield
    finally:
        for name, layer in mixture.layers.items():
            model.set_submodule(name, layer)
        if shared is not None:
            model.add_module("molex", shared)


def original_names(mixture: Mixture, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's part of a converted model's state_dict, named as before the conversion."""
    renamed = {}
    for name, tensor in state_dict.items():
        if not mixture.owns(name):
            layer, _, rest = name.rpartition(".base.")
            renamed[f"{layer}.{rest}" if layer in mixture.layers else name] = tensor
    return renamed


def push_folder(directory: Path, names: list[str], token: str | bool | None, options: dict[str, Any]) -> None:
    """Uploads these files of a folder. options: repo_id, commit_message, create_pr; the rest is create_repo's."""
    commit = {name: options.pop(name, None) for name in ("commit_message", "create_pr")}
    repo_id = options.pop("repo_id", directory.name)
    options.setdefault("token", token)
    repo_id = huggingface_hub.create_repo(repo_id, exist_ok=True, **options).repo_id
    commit["commit_message"] = commit["commit_message"] or "Upload model"
    huggingface_hub.upload_folder(
        repo_id=repo_id, folder_path=directory, allow_patterns=names, token=options["token"], **commit
    )


def _drop_stale_weights(directory: Path, names: list[str]) -> None:
    """Weight files of an earlier save in other shards: the stock loader could take them for this one's."""
    if not any(_WEIGHT_FILE.fullmatch(name) for name in names):
        return
    for path in directory.iterdir():
        if path.name not in names and _WEIGHT_FILE.fullmatch(path.name):
            path.unlink()
