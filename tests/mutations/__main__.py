"""Which single changes of the product does no test notice?

    python -m tests.mutations                  # all rooms; goes on where it was stopped
    python -m tests.mutations gates surgery    # some
    python -m tests.mutations gates/frozen     # one; --again: also where nothing has changed since

Each mutation is made in a copy of the tree, never in the tree itself, and the tests that ought to
notice it run there, to the first failure, in a process that is forked after the libraries were
loaded once. Whatever exceeds the time limit has been noticed as a hang. At the end of a room the
tests that failed are run without any mutation, where they must pass. What was found is kept in
``tests/bench/results/mutations.json`` with a digest of the mutated file and of its tests, and told
in ``mutations.md`` beside it.
"""

import argparse
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from tests.mutations.catalogue import TREE, Mutation, mutations, rooms

_RESULTS = TREE / "tests" / "bench" / "results" / "mutations.json"
_TABLE = _RESULTS.with_suffix(".md")
# pytest's exit codes; a module that does not load: 2; nothing is selected: 5
_FAILED, _PASSED, _INTERRUPTED, _NOTHING = 1, 0, 2, 5
_HUNG = "hung"

Record = dict[str, Any]


def main() -> int:
    """Runs what was asked for; 1 where something survives unargued, or a test fails without."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("what", nargs="*", help=f"ROOM or ROOM/NAME; rooms: {' '.join(rooms())}")
    parser.add_argument("--again", action="store_true", help="also what has not changed since")
    parser.add_argument("--untried", action="store_true", help="only what was never tried")
    parser.add_argument("--table", action="store_true", help="write the table anew, try nothing")
    parser.add_argument("--limit-s", type=float, default=600, help="seconds for one mutation (600)")
    options = parser.parse_args()
    everything = [mutation for room in rooms() for mutation in mutations(room)]
    asked = [m for what in options.what or rooms() for m in everything if what in (m.room, str(m))]
    if not asked:
        parser.error(f"no mutation of {' '.join(options.what)}; rooms: {' '.join(rooms())}")
    records: dict[str, Record] = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    records = {str(m): records[str(m)] for m in everything if str(m) in records}
    if options.table:
        _write(records, everything, stale=True)
        return 0
    _load_libraries()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the tests that run end too
    broken: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = _copy_tree(Path(folder, "tree"))
        for _, room in itertools.groupby(asked, lambda mutation: mutation.room):
            fresh = []
            for mutation in room:
                digest, known = mutation.digest(copy), records.get(str(mutation), {})
                if known and (options.untried or known["digest"] == digest) and not options.again:
                    continue
                record = _try(mutation, copy, options.limit_s)
                records[str(mutation)] = {**record, "digest": digest}
                fresh.append(records[str(mutation)])
                sys.stdout.write(f"{record['outcome']:9} {record['seconds']:5.0f} s  {mutation}\n")
                sys.stdout.flush()
                _write(records, everything)
            by = tuple(dict.fromkeys(record["by"] for record in fresh if "by" in record))
            code, failing = _pytest(copy, by, "", 10 * options.limit_s) if by else (_PASSED, ())
            if code != _PASSED:
                for name in [n for n, record in records.items() if record.get("by") in failing]:
                    del records[name]
                _write(records, everything)
                broken += failing
    survivors = [
        m
        for m in asked
        if records.get(str(m), {}).get("outcome") == "survived" and not m.equivalent
    ]
    for mutation in survivors:
        sys.stdout.write(f"survivor: {mutation}: {mutation.loses}\n")
    for test in broken:
        sys.stdout.write(f"fails without any mutation: {test}\n")
    return bool(survivors or broken)


def _load_libraries() -> None:
    """What every test would load anew, in the surroundings of the tests."""
    importlib.import_module("tests.conftest")
    for name in ("torch", "transformers", "timm", "accelerate", "datasets"):
        importlib.import_module(name)


def _copy_tree(target: Path) -> Path:
    """What git tracks or would, as it is now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=TREE, check=True, capture_output=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (TREE / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TREE / name, target / name)
    return target


def _try(mutation: Mutation, tree: Path, limit_s: float) -> Record:
    source, start = mutation.source(tree), time.monotonic()
    plain = source.read_text("utf-8")
    source.write_text(mutation.mutant(tree), "utf-8")
    try:
        code, by = _PASSED, ()
        for select in (mutation.first, mutation.select) if mutation.first else (mutation.select,):
            if code in (_PASSED, _NOTHING):
                code, by = _pytest(tree, mutation.tests, select, limit_s)
    finally:
        source.write_text(plain, "utf-8")
    seconds = round(time.monotonic() - start)
    if code == _PASSED:
        return {"outcome": "survived", "seconds": seconds}
    if code == _HUNG:
        return {"outcome": "hung", "seconds": seconds}
    if code not in (_FAILED, _INTERRUPTED) or not by:
        raise SystemExit(f"{mutation}: pytest ends with {code} and names no test")
    return {"outcome": "killed", "seconds": seconds, "by": by[0]}


def _pytest(
    tree: Path, tests: tuple[str, ...], select: str, limit_s: float
) -> tuple[int | str, tuple[str, ...]]:
    """The exit code, or that it hung, and what failed."""
    shutil.rmtree(cache := tree / ".mutations_cache", ignore_errors=True)
    files = dict.fromkeys(file for test in tests for file in _files(tree, test))
    arguments = ["-q", "-o", f"cache_dir={cache}", *files, *(["-k", select] if select else [])]
    until = time.monotonic() + limit_s
    process = os.fork()
    if not process:
        _run_forked(tree, ["-x", *arguments] if "::" not in tests[0] else arguments)
    code: int | str = _HUNG
    try:
        while code == _HUNG and time.monotonic() < until:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.1)
    finally:
        if code == _HUNG:
            os.killpg(process, signal.SIGKILL)  # and what the tests have started
            os.waitpid(process, 0)
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    failed = cache / "v" / "cache" / "lastfailed"
    return code, tuple(json.loads(failed.read_text())) if failed.exists() else ()


def _files(tree: Path, test: str) -> list[str]:
    """What is in a folder of tests: pytest would forget that another file was to come first."""
    inside = sorted((tree / test).rglob("test_*.py"))
    return [str(file.relative_to(tree)) for file in inside] or [test]


def _run_forked(tree: Path, arguments: list[str]) -> NoReturn:
    """In the forked process: everything of ours comes from ``tree``."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    silent = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(silent, descriptor)
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    ours = {"", str(TREE), str(Path.cwd())}
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ours)]
    for name in [n for n in sys.modules if n.partition(".")[0] in ("tests", "sosp_hub")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins are loaded already
    code = 3
    try:
        code = int(importlib.import_module("pytest").main([*quiet, *arguments]))
    finally:
        os._exit(code)


def _write(records: dict[str, Record], everything: list[Mutation], stale: bool = False) -> None:
    _RESULTS.write_text(json.dumps(records, indent=1) + "\n", "utf-8")
    lines = [
        "# Mutations: single changes of the product, and whether a test notices",
        "",
        "`python -m tests.mutations` ([how](../../mutations/__main__.py)); each mutation, with what"
        " a user would lose, is in [rooms](../../mutations/rooms). Noticed: a test fails, or the"
        " time limit ends a hang. Argued: survives, and no user can see a difference."
        " Rates are of what was tried, after tests were written for what had survived.",
        "",
        "| room | mutations | tried | noticed | argued | survive | rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    if stale:
        old = sum(records[str(m)]["digest"] != m.digest() for m in everything if str(m) in records)
        lines.insert(-3, f"{old} outcomes are of an earlier state of the file or of its tests.")
    total = Counter()
    for room in [*rooms(), "all"]:
        counts = total if room == "all" else _counts(room, records, everything)
        total = total if room == "all" else total + counts
        must = counts["tried"] - counts["argued"]
        rate = f"{100 * counts['noticed'] / must:.0f} %" if must else ""
        columns = ("mutations", "tried", "noticed", "argued", "survived")
        lines.append(f"| {room} | {' | '.join(str(counts[c]) for c in columns)} | {rate} |")
    for title, argued in (("What survives", False), ("Argued", True)):
        found = [
            f"- `{m}`: {m.loses}" + f". {m.equivalent}" * argued
            for m in everything
            if records.get(str(m), {}).get("outcome") == "survived" and bool(m.equivalent) == argued
        ]
        lines += ["", f"## {title}", "", *(found or ["Nothing."])]
    _TABLE.write_text("\n".join(lines) + "\n", "utf-8")


def _counts(room: str, records: dict[str, Record], everything: list[Mutation]) -> Counter:
    counts = Counter()
    for mutation in (m for m in everything if m.room == room):
        counts["mutations"] += 1
        outcome = records.get(str(mutation), {}).get("outcome")
        counts["tried"] += outcome is not None
        counts["noticed"] += outcome in ("killed", "hung")
        survived = outcome == "survived"
        counts["argued"] += survived and bool(mutation.equivalent)
        counts["survived"] += survived and not mutation.equivalent
    return counts


if __name__ == "__main__":
    raise SystemExit(main())
