"""Weights of a timm model in several files, which timm itself does not read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor

from sosp_hub.checkpoint.format import headers
from sosp_hub.compat.timm import split_id

State = dict[str, Tensor]


def from_folder(timms_own: Callable[..., State]) -> Callable[..., State]:
    """Stands where timm looks for the weight file of a folder.

    Args:
        timms_own: What it does where there are no shards.
    """

    def load(path: str | Path, *args: Any, **kwargs: Any) -> State:
        folder = Path(path)
        if (folder / headers.WEIGHTS).is_file() or not (folder / headers.INDEX).is_file():
            return timms_own(path, *args, **kwargs)
        return _read(folder)

    return load


def from_hub(timms_own: Callable[..., State]) -> Callable[..., State]:
    """Stands where timm fetches the weight file of a hub id; asks for shards where there is none.

    Args:
        timms_own: What it does.
    """

    def load(model_id: str, *args: Any, cache_dir: Any = None, **kwargs: Any) -> State:
        try:
            return timms_own(model_id, *args, cache_dir=cache_dir, **kwargs)
        except EntryNotFoundError as none:
            repo_id, revision = split_id(model_id)
            where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
            try:
                folder = Path(hf_hub_download(repo_id, headers.INDEX, **where)).parent
            except EntryNotFoundError:
                raise none from None
            for name in sorted(set(headers.read_index(folder).values())):
                hf_hub_download(repo_id, name, **where)
            return _read(folder)

    return load


def _read(folder: Path) -> State:
    """All tensors, after the headers were checked.

    Raises:
        CheckpointError: Missing, truncated or damaged files.
    """
    names = sorted({tensor.file for tensor in headers.read_tensors(folder).values()})
    state: State = {}
    for name in names:
        state |= load_file(folder / name)
    return state
