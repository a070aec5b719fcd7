"""Licence texts travel with the weights they cover."""

import logging
import shutil
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download

log = logging.getLogger(__name__)

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")


def copy_licence_files(base: str | Path, folder: Path, revision: str | None = None) -> list[str]:
    """Copies the base model's licence texts beside the pruned weights; present files stay.

    Args:
        base: Hub id, or a local folder with the base model.
        folder: The pruned model's folder.
        revision: Commit of the base model.

    Returns:
        Names of the base model's licence files; empty where it has none or cannot be asked.
    """
    source = Path(base)
    if not source.is_dir():
        try:
            source = Path(
                snapshot_download(
                    str(base), revision=revision, allow_patterns=list(LICENCE_FILES), etag_timeout=5
                )
            )
        except Exception as error:  # noqa: BLE001 - a missing text must not lose a finished run
            log.warning(
                "%s: its licence files could not be copied (%s); add them before you publish",
                base,
                type(error).__name__,
            )
            return []
    paths = [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in LICENCE_FILES)
    ]
    for path in paths:
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    return [path.name for path in paths]
