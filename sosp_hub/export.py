"""``python -m sosp_hub.export FOLDER --to TARGET``: a pruned model for where it is served."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sosp_hub.atomic import as_others_are, draft_folder_in, put_in_place, writing
from sosp_hub.callable_module import make_callable
from sosp_hub.command_name import command_name
from sosp_hub.errors import CheckpointError, ModelError, SospHubError
from sosp_hub.recipe.targets import TARGETS, Target, make_target

if TYPE_CHECKING:
    from torch import nn


def export(
    model: "nn.Module | str | Path",
    to: "str | Target",
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    **options: Any,
) -> Path:
    """Writes a pruned model in the form that another reader takes: as a whole, or not at all.

    Args:
        model: A model, or a folder or hub id that ``from_pretrained`` loads. It stays as it is.
        to: Name of a target, such as ``deci``, ``gguf``, ``onnx``, ``padded``.
        out: New folder, or file with the ending of the target; None = beside the model's folder,
            with the name of the target.
        tokenizer: Goes into the files; None = the folder's own, where it has one.
        **options: Of the target.

    Returns:
        What was written.

    Raises:
        CheckpointError: An unknown target or option, a layer that the target has no form for, a
            place that is taken, or a package that is missing.
        ModelError: No model, one without weights, or one that the target has no form for.
        OutputError: The place cannot be written.

    Example:
        >>> import sosp_hub, tempfile, timm, torch
        >>> net = timm.create_model("test_resnet", num_classes=5).eval()
        >>> graph = sosp_hub.trace(net, (torch.randn(1, 3, 32, 32),))
        >>> scores = sosp_hub.score(net, graph, [], criterion="magnitude")
        >>> plan = sosp_hub.allocate(graph, scores, params=0.7)
        >>> small, folder = sosp_hub.apply(net, graph, plan), tempfile.mkdtemp()
        >>> program = sosp_hub.export(small, "torch-export", f"{folder}/small.pt2")
        >>> program.name
        'small.pt2'
    """
    target = to if isinstance(to, Target) else make_target(to, CheckpointError, **options)
    if target is to and options:
        raise CheckpointError(
            f"export: got a target and the options {', '.join(options)}; give its name with them"
        )
    _check_given(model, out, tokenizer)
    folder = None
    if isinstance(model, str | Path):
        from sosp_hub.checkpoint.io import from_pretrained

        folder = Path(model)
        tokenizer = tokenizer if tokenizer is not None else _tokenizer_of(folder)
        model = from_pretrained(folder if folder.is_dir() else str(folder))
    from sosp_hub.checkpoint.io import check_no_adapters, check_not_quantised
    from sosp_hub.compat.torch import unwrapped

    plain = unwrapped(model)
    check_no_adapters(plain)
    check_not_quantised(plain)
    if out is None and folder is None:
        raise CheckpointError("export: a model in memory has no folder; give out=")
    place = Path(out) if out is not None else _beside(Path(str(folder)), target)
    if target.suffix and place.suffix != target.suffix:
        instead = place / "model" if place.is_dir() else place
        raise CheckpointError(
            f"{place}: what {target.name} writes is a file that ends in {target.suffix}; give "
            f"{instead}{target.suffix}"
        )
    _check_free(place)
    from sosp_hub.modes import in_own_modes

    in_own_modes(_write)(plain, target, place, tokenizer)
    return place


def _write(model: "nn.Module", target: Target, place: Path, tokenizer: Any) -> None:
    from sosp_hub.modes import evaluating
    from sosp_hub.structure.isolation import random_numbers_kept

    with writing(place), random_numbers_kept(), evaluating(model):
        place.parent.mkdir(parents=True, exist_ok=True)
        with draft_folder_in(place.parent, place.name) as draft:
            target.write(model, draft / place.name, tokenizer)
            as_others_are(draft)
            written = sorted(draft.iterdir())
            for path in written:
                _check_free(place.with_name(path.name))
            for path in written:
                put_in_place(path, place.with_name(path.name))


def _check_given(model: Any, out: Any, tokenizer: Any) -> None:
    """Refuses what is no model, no path and no tokenizer."""
    if not isinstance(model, str | Path):
        parameters = getattr(model, "parameters", None)
        if not callable(parameters):
            raise ModelError(
                f"export: got a {type(model).__name__}, expected a model, a folder or a hub id"
            )
        if any(each.is_meta for each in model.parameters()):
            raise ModelError(
                f"export: the {type(model).__name__} has no weights (meta device); load them"
            )
    if not isinstance(out, str | Path | None):
        raise CheckpointError(f"export: out is a path, got {out!r}")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise CheckpointError(
            f"export: tokenizer is a tokenizer, such as AutoTokenizer.from_pretrained(...) gives, "
            f"got {tokenizer!r}"
        )


def _check_free(place: Path) -> None:
    if place.exists() and (place.is_file() or any(place.iterdir())):
        raise CheckpointError(f"{place}: is there already; give another place, or remove it")


def _beside(folder: Path, target: Target) -> Path:
    name = folder.resolve().name if folder.is_dir() else folder.name
    above = folder.resolve().parent if folder.is_dir() else Path()
    return above / (f"{name}{target.suffix}" if target.suffix else f"{name}-{target.name}")


def _tokenizer_of(folder: Path) -> Any:
    """The tokenizer beside a model; None where there is none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code: 0 done, 2 something for the user to change."""
    options = command_parser().parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sosp_hub").setLevel(logging.INFO)
    try:
        target = make_target(options.to, CheckpointError, **_options(options.option))
        written = export(options.model, target, options.out)
    except SospHubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in _files(written))
    print(f"{written}: {size / 1e6:.1f} MB, for {target.reads}")
    return 0


def _files(written: Path) -> list[Path]:
    return [p for p in written.rglob("*") if p.is_file()] if written.is_dir() else [written]


def _options(given: Sequence[str]) -> dict[str, Any]:
    import yaml

    options = {}
    for each in given:
        key, sign, value = each.partition("=")
        if not sign:
            raise CheckpointError(f"{each!r}: write an option as KEY=VALUE")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise CheckpointError(f"{each!r}: the value is no YAML; write KEY=VALUE") from error
    return options


def command_parser() -> argparse.ArgumentParser:
    """The command line of ``export``."""
    lines = []
    for name, target in TARGETS.known().items():
        lines.append(f"  {name:<14}{target.summary()}. Read by {target.reads}.".replace("``", ""))
        for key, field in target.model_fields.items():
            if key != "name":
                lines.append(f"{'':16}{key}={field.default}: {field.description}")
    parser = argparse.ArgumentParser(
        prog=command_name("export"),
        description="Writes a pruned model for where it is served. The same targets, named as "
        "budget.target in a recipe, make a plan that they take without filling up.",
        epilog="targets:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="FOLDER", help="a folder or a hub id")
    parser.add_argument("--to", required=True, metavar="TARGET", help="see below")
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="new folder, or file with the ending of the target; null = beside FOLDER",
    )
    parser.add_argument("option", nargs="*", metavar="KEY=VALUE", help="options of the target")
    return parser


make_callable(__name__, export)

if __name__ == "__main__":
    sys.exit(main())
