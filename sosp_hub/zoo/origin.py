"""Where weights come from: hub id, commit, and what a card may inherit from the base's card."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sosp_hub.errors import SospHubError
from sosp_hub.untrusted import MOST_CARD_BYTES, UnreadableError, front_matter, read_text

log = logging.getLogger(__name__)

_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_IN_CACHE = re.compile(r"models--(?P<id>.+)/snapshots/(?P<commit>[0-9a-f]{40})$")


@dataclass(frozen=True)
class Origin:
    """The base model as a card names it.

    Attributes:
        base_model: Hub id; None for a local folder or random weights, whatever path they came from.
        base_revision: Commit, where known.
        card: Fields of the base's card that hold for a pruned model too; empty where it is not
            readable.
    """

    base_model: str | None = None
    base_revision: str | None = None
    card: Mapping[str, Any] = field(default_factory=dict)


def origin_of_folder(folder: Path) -> Origin:
    """A folder has no hub id, unless it is a snapshot in the hub's own cache."""
    snapshot = _IN_CACHE.search(folder.expanduser().absolute().as_posix())
    card = _inherited(folder / "README.md") if (folder / "README.md").is_file() else {}
    if snapshot is None:
        return Origin(card=card)
    return Origin(snapshot["id"].replace("--", "/"), snapshot["commit"], card)


def origin_on_hub(repo_id: str, revision: str | None) -> Origin:
    """The origin of weights that were just loaded from the hub, or from its cache."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    from sosp_hub.compat.huggingface_hub import transport_error

    file = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    snapshot = _IN_CACHE.search(Path(file).parent.as_posix()) if isinstance(file, str) else None
    commit = snapshot["commit"] if snapshot else None
    try:
        card = _inherited(Path(hf_hub_download(repo_id, "README.md", revision=commit or revision)))
    except (OSError, ValueError, SospHubError, transport_error()) as error:
        log.warning(
            "the card of %s is not readable, so nothing is inherited from it (%s)", repo_id, error
        )
        card = {}
    return Origin(repo_id, commit, card)


def _inherited(file: Path) -> dict[str, Any]:
    try:
        data = front_matter(read_text(file, MOST_CARD_BYTES))
    except UnreadableError as error:
        log.warning("%s is not readable as a card (%s)", file, error)
        return {}
    return {key: data[key] for key in _INHERITED if _is_text(data.get(key))}


def _is_text(value: object) -> bool:
    """Whether it is words, or a list of words."""
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and word for word in words)
