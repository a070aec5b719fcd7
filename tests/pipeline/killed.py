"""A recipe whose run is killed in one stage after the other, and one that nobody touches.

``python -m tests.pipeline.killed RECIPE WHOLE KILLED`` prints, as JSON, where it was killed. Each
run is a process of its own by fork, so that the libraries are loaded once.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from sosp_hub import atomic, prune, training
from sosp_hub.pipeline import output_folder
from sosp_hub.pipeline.stage_cache import StageCache

Kill = Callable[[str], None]
"""Gets the name of a point in the run; may not come back."""


def watch(kill: Kill) -> None:
    """Calls ``kill`` where a kill hurts most: what was made is there, what says so is not."""

    def between(owner: Any, method: str, name: Callable[..., str], *, after: bool) -> None:
        call = getattr(owner, method)

        def watched(*args: Any, **options: Any) -> Any:
            if not after:
                kill(name(*args))
            made = call(*args, **options)
            if after:
                kill(name(*args))
            return made

        setattr(owner, method, watched)

    between(StageCache, "write", lambda _, step, *__: f"{step.name}: no record", after=False)
    between(training._Saved, "save", lambda _, step, *__: f"state of step {step}", after=True)
    between(training, "put_in_place", lambda draft, _: f"draft {draft.name}", after=False)
    between(output_folder, "put_in_place", lambda *_: "result written", after=False)
    between(StageCache, "remove", lambda _: "result in place", after=False)
    remove, unlink = shutil.rmtree, os.unlink

    def removing(path: Any, *args: Any, **options: Any) -> None:
        if str(path).endswith(".partial"):
            for file in sorted(path.glob("*.safetensors")):
                unlink(file)
            kill("half removed")
        remove(path, *args, **options)

    shutil.rmtree = removing


def run(arguments: list[str], kill: Kill) -> bool:
    """Whether a run in a process of its own ended by itself."""
    child = os.fork()
    if not child:
        watch(kill)
        os._exit(prune.main(arguments))
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    assert os.waitstatus_to_exitcode(status) == 0, f"exit code of {arguments}"
    return True


def points(arguments: list[str]) -> Iterator[str]:
    """Those that a whole run comes by, each once."""
    reader, writer = os.pipe()
    run(arguments, lambda name: os.write(writer, f"{name}\n".encode()) and None)
    os.close(writer)
    with os.fdopen(reader) as names:
        yield from dict.fromkeys(names.read().splitlines())


def main(recipe: str, whole: str, killed: str) -> None:
    """Runs both; the second is killed wherever the first came by."""
    places = list(points([recipe, f"output.dir={whole}"]))

    def at(place: str) -> Kill:
        return lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == place else None

    again = [recipe, f"output.dir={killed}"]
    hit = [place for place in places if not run([*again, *_OVER], at(place))]
    assert run([*again, *_OVER], at("nowhere"))
    sys.stdout.write(json.dumps({"points": places, "killed": hit}) + "\n")


_OVER = ("--overwrite",)  # from where the result is in its place on
assert atomic.put_in_place is training.put_in_place

if __name__ == "__main__":
    main(*sys.argv[1:])
