"""How a command of this package was called, for its help and for the record of a run."""

import sys
from pathlib import Path


def command_name(verb: str) -> str:
    """``sosp VERB`` where the installed command runs, else ``python -m sosp_hub.VERB``."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    if program.stem == "sosp":
        return f"sosp {verb}"
    if program.name == "__main__.py" and program.parent.name == "sosp_hub":
        return f"python -m sosp_hub {verb}"
    return f"python -m sosp_hub.{verb}"
