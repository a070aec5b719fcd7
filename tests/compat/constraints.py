"""Prints ``constraints.txt`` for what is installed: `python -m tests.compat.constraints`.

All that ``.[test]`` brings, in the versions of this environment, for which the whole suite must
have passed. Left out is what torch pins itself, and what exists on some machines only: the packages
of CUDA.
"""

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FILE = Path(__file__).parent.parent.parent / "constraints.txt"
HEAD = """\
# The newest versions with which the whole suite passed, for
#   pip install -e '.[test]' -c constraints.txt && pytest
# Written by `python -m tests.compat.constraints > constraints.txt` after it did.
"""
LEFT_OUT = ("cuda-", "nvidia-", "triton", "setuptools", "sosp-hub")


def needed(name: str, extras: tuple[str, ...], found: dict[str, str]) -> dict[str, str]:
    """Versions of a distribution and of all that it needs here."""
    key = canonicalize_name(name)
    if key in found and not extras:
        return found
    installed = metadata.distribution(name)
    found[key] = f"{installed.metadata['Name']}=={installed.version.partition('+')[0]}"
    for line in installed.requires or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            needed(requirement.name, tuple(requirement.extras), found)
    return found


def main() -> None:
    lines = needed("sosp_hub", ("test",), {})
    kept = [lines[name] for name in sorted(lines) if not name.startswith(LEFT_OUT)]
    sys.stdout.write(HEAD + "".join(f"{line}\n" for line in kept))


if __name__ == "__main__":
    main()
