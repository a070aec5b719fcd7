"""``python -m sosp_hub.inspect PATH_OR_ID``: what a checkpoint holds, without its weights."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sosp_hub.command_name import command_name
from sosp_hub.errors import SospHubError, printable

if TYPE_CHECKING:
    from sosp_hub.inspection.examine import Findings, Layer

_LEAST_NAME = 16  # columns
_SIZES = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was found; the exit code: 0 fine, 1 the files disagree, 2 no checkpoint."""
    options = command_parser().parse_args(arguments)
    try:
        if options.verify:
            return _verify(options.model, options.revision)
        if options.draft_for:
            return _draft(options.model, options.draft_for, options.revision, json_=options.json)
        from sosp_hub.inspection.examine import examine

        findings = examine(options.model, revision=options.revision)
    except SospHubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(dataclasses.asdict(findings), indent=1))
    else:
        _show(findings, whole=options.all)
    return 1 if findings.faults else 0


def command_parser() -> argparse.ArgumentParser:
    """The command line of ``inspect``."""
    parser = argparse.ArgumentParser(
        prog=command_name("inspect"),
        description="Reads the config and the headers of the weights of a model, and nothing else: "
        "kept width, parameters, MACs and bytes per layer, where it loads without this "
        "package, and whether config, delta and weights agree.",
    )
    parser.add_argument("model", metavar="PATH_OR_ID", help="a folder or a hub id")
    parser.add_argument("--revision", help="commit, branch or tag on the hub")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--all", action="store_true", help="list layers that were not cut too")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="download the weights and check what the card says: hashes, sizes, metrics again",
    )
    parser.add_argument(
        "--draft-for",
        metavar="BASE",
        help="load both models and generate with the pruned one as assistant_model of BASE: tokens "
        "that each pass of BASE yields, tokens per second, whether the output is identical",
    )
    return parser


def _draft(model: str, base: str, revision: str | None, *, json_: bool) -> int:
    from transformers import AutoTokenizer

    from sosp_hub.cut import from_pretrained
    from sosp_hub.drafting import PROMPTS, measure_drafting

    given = {} if revision is None else {"revision": revision}
    draft, parent = from_pretrained(model, **given), from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in PROMPTS]
    found = measure_drafting(parent, draft, prompts)
    print(json.dumps(dataclasses.asdict(found), indent=1) if json_ else found)
    return 0 if found.identical else 1


def _verify(model: str, revision: str | None) -> int:
    from sosp_hub.hub.verify import verify

    result = verify(model, revision=revision)
    print(printable(str(result)))
    return 0 if result.holds else 1


def _show(findings: "Findings", *, whole: bool) -> None:
    from rich.table import Table

    from sosp_hub.report.listing import new_console

    console = new_console()
    console.print(
        printable(
            f"{findings.source}: {findings.architecture} ({findings.library}), {findings.tier}"
        ),
        highlight=False,
    )
    cut = [
        layer for layer in findings.layers if whole or layer.dense_shape not in (None, layer.shape)
    ]
    rows = cut or findings.layers
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "shape", "params", "MACs", "bytes"):
        side = "left" if column in ("layer", "shape") else "right"
        table.add_column(column, justify=side, overflow="fold")
    totals = findings.totals
    shown = [(_shapes(layer), *_sizes(layer)) for layer in rows]
    params, macs, size = (_change(totals, key) for key in ("params", "macs", "bytes"))
    shown.append(("", params, macs, size))
    widths = [max(map(len, "\n".join(cells).split("\n"))) for cells in zip(*shown, strict=True)]
    room = max(_LEAST_NAME, console.width - sum(widths) - 2 * len(widths))
    names = [printable(layer.name) for layer in rows]
    ends = [name if len(name) <= room else f"…{name[1 - room :]}" for name in names]
    names = ends if len(set(ends)) == len(ends) else names  # else whole, on several lines
    for name, cells in zip(names, shown, strict=False):
        table.add_row(name, *cells)
    table.add_section()
    table.add_row("all", *shown[-1])
    if rows:
        console.print(table)
    if len(rows) < len(findings.layers):
        console.print(f"{len(findings.layers) - len(rows)} more layers are whole (--all)")
    if findings.sample:
        console.print(printable(f"MACs are for one sample of {findings.sample}"))
    for reader in findings.readers:
        says = {True: "yes", False: "no", None: "perhaps"}[reader.loads]
        console.print(printable(f"{reader.name}: {says}; {reader.why}"))
    for fault in findings.faults:
        console.print(printable(f"DISAGREES: {fault}"), style="bold")
    if not findings.faults and findings.layers:
        parts = "config, delta and weights" if findings.tier == "delta" else "config and weights"
        apart = len(findings.packed)
        but = f", but for {apart} quantised modules, which cannot be compared" if apart else ""
        console.print(f"{parts} agree{but}")


def _shapes(layer: "Layer") -> str:
    now = "x".join(map(str, layer.shape))
    if layer.dense_shape in (None, layer.shape):
        return now
    return f"{now} of {'x'.join(map(str, layer.dense_shape))}"


def _change(totals: "dict[str, int | None]", key: str) -> str:
    now, dense = totals.get(key), totals.get(f"dense_{key}")
    if now is None or not dense:
        return _short(now)
    return f"{_short(now)} of {_short(dense)}\n({now / dense:.0%})"


def _sizes(layer: "Layer") -> tuple[str, str, str]:
    return _short(layer.params), _short(layer.macs), _short(layer.bytes)


def _short(number: int | None) -> str:
    if number is None:
        return "?"
    for size, letter in _SIZES:
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)


if __name__ == "__main__":
    sys.exit(main())
