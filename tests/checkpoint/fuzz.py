"""Mutations led by coverage: what breaks a reader of checkpoints with anything but a typed error?

    pip install atheris
    python -m tests.checkpoint.fuzz delta -runs=100000     # or config, or header
    SOSP_HUB_FUZZ=10000 pytest tests/checkpoint -k mutated    # at random, without atheris

The options are libFuzzer's: with a folder, input that reaches new code is kept there. Input that
breaks something is written to ``crash-...``; name that file in place of ``-runs`` to try it again,
and make it a case of `test_hostile`.

Last run at random (2026-11-29, readers of 97b4c6e, ``SOSP_HUB_FUZZ=10000``), nothing found: of
10,000 deltas 816 were accepted, of 10,000 headers 225, and of 10,000 configs 540, each of which
held the numbers of the files; all others ended in an error of this package.

The same day 1,500 configs of a model of no library (readers of 0352f81): 10 were accepted and held
the numbers of the files, nothing else found.

Last run led by coverage (2026-11-22, readers of e5487a3): 12,000 executions of each target and
74,000 more of ``header``, nothing found. What trying by hand had found before is now among the
cases: sizes for which transformers makes up tensors before it compares them, and 10^9 layers or
labels.
"""

import random
import sys
import tempfile
from pathlib import Path

_LONGEST = 4096
_OPTIONS = ["-timeout=60", f"-max_len={_LONGEST}", "-len_control=0"]
_NUM_SEEDS = 64


def main() -> None:
    """Fuzzes one target."""
    import atheris

    with atheris.instrument_imports(include=["sosp_hub.checkpoint"]):
        from tests.checkpoint.mutations import ENDED, TARGETS
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    name, *options = [*sys.argv[1:], ""][: max(len(sys.argv) - 1, 1)]
    if name not in TARGETS:
        raise SystemExit(
            f"usage: python -m tests.checkpoint.fuzz {{{'|'.join(TARGETS)}}} [options]"
        )

    def run(content):
        TARGETS[name].hypothesis.fuzz_one_input(content)
        if sum(ENDED.values()) % 1000 == 999:  # libFuzzer ends the process without a last word
            sys.stderr.write(f"inputs that reached a reader, by what came of them: {dict(ENDED)}\n")

    with tempfile.TemporaryDirectory() as seeds:
        for i in range(_NUM_SEEDS):  # shorter input says too little to make a mutation
            Path(seeds, str(i)).write_bytes(random.Random(i).randbytes(_LONGEST))
        options = [*_OPTIONS, *options, seeds]
        atheris.Setup([sys.argv[0], *options], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
