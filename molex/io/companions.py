"""What lies beside a checkpoint's weights: tokenizer, chat template, generation settings, licence."""

import shutil
from collections.abc import Sequence
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
COMPANION_FILES = (*TOKENIZER_FILES, "generation_config.json", "p*processor_config.json", "LICENSE*")


def copy_files(folder: Path, scratch: Path, patterns: Sequence[str] = COMPANION_FILES) -> int:
    """Copies a folder's files of these patterns, and says how many there were."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    for path in found:
        shutil.copyfile(path, scratch / path.name)
    return len(found)
