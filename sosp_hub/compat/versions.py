"""With which versions of its libraries the package was tested, and which are installed."""

import functools
import json
import logging
from importlib import metadata, resources

from packaging.version import InvalidVersion, Version

from sosp_hub.compat.smoke import LIBRARIES

_LOG = logging.getLogger("sosp_hub")


def tested() -> dict[str, str]:
    """Newest version of each library with which the whole suite passed."""
    return json.loads(resources.files("sosp_hub.compat").joinpath("tested.json").read_text())


def installed(library: str) -> str | None:
    """Version of a library here; None where it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def is_newer(version: str | None, than: str) -> bool:
    """Whether a version came out after another one; builds of one version are the same."""
    try:
        return version is not None and Version(Version(version).public) > Version(than)
    except InvalidVersion:  # somebody's own build
        return False


@functools.cache
def tell_newer() -> None:
    """One log line in a process, where a library is newer than the newest that was tested."""
    known = tested()
    versions = {library: installed(library) for library in LIBRARIES}
    newer = [
        f"{library} {version} (tested: {known[library]})"
        for library, version in versions.items()
        if is_newer(version, known[library])
    ]
    if newer:
        _LOG.warning(
            "newer than the newest that sosp_hub was tested with: %s; "
            "`python -m sosp_hub.doctor` tries what it needs of them",
            ", ".join(newer),
        )
