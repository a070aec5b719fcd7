"""A few numbers that a cut module gives on made-up inputs, so that a reader's own is compared.

Names, shapes and classes of modules do not say what ``forward`` does with them: a function that was
exchanged there, such as an activation, would load without a word.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.errors import CheckpointError
from sosp_hub.structure.isolation import isolated

KEY = "sosp_hub_check"
"""Beside the delta in ``config.json``."""
INPUTS = "_sosp_hub_inputs"
"""Set on a cut model: the form of the inputs that it was traced with."""

_MOST_VALUES = 2**22
_MOST_LEAVES = 64
_MOST_DEPTH = 4
_NUM_SHOWN = 8
_TOLERANCE = {torch.float64: 2e-3, torch.float32: 2e-3}  # other devices take other kernels
_HALF_TOLERANCE = 5e-2
_STEADY = 4  # so many times steadier an output has to be to be compared at all


def remember(model: nn.Module, inputs: Any) -> None:
    """Keeps on a cut model the form of its inputs: shapes and ranges, none of their values."""
    vars(model).pop(INPUTS, None)
    arguments = inputs if isinstance(inputs, Mapping | tuple | list) else (inputs,)
    leaves = list(_leaves(arguments))
    if len(leaves) > _MOST_LEAVES or sum(map(torch.numel, leaves)) > _MOST_VALUES:
        return
    form = _form(arguments)
    if form is not None:
        vars(model)[INPUTS] = form


def check_of(model: nn.Module) -> dict[str, Any] | None:
    """What a file says of a model's outputs; None where they would be no proof.

    That is where the inputs have no form, the model does not run on made-up ones, or what it gives
    depends on chance or on differences as small as those between devices.
    """
    form = vars(model).get(INPUTS)
    if form is None:
        return None
    try:
        told = _outputs(model, form, seed=0)
        others = [_outputs(model, form, seed=1), _outputs(model, form, seed=0, noise=1e-5)]
    except Exception:  # noqa: BLE001 - inputs that we made up; the reader does without
        return None
    tolerance = _tolerance(model) / _STEADY
    if not any(told) or any(_differs(told, other, tolerance) for other in others):
        return None
    return {"inputs": form, "outputs": told}


def compare(model: nn.Module, record: Any) -> None:
    """Compares what a loaded model gives with what a file says.

    Raises:
        CheckpointError: It computes something else, or the record is none.
    """
    if record is None:
        return
    form, told = _read(record)
    vars(model)[INPUTS] = form
    try:
        given = _outputs(model, form, seed=0)
        why = _differs(told, given, _tolerance(model))
    except Exception as error:  # noqa: BLE001 - whatever the reader's code meets
        why = f"it fails ({type(error).__name__}: {error})"
    if why:
        raise CheckpointError(
            f"model= is a {type(model).__name__} that computes something else than the one that "
            f"was saved: on the same inputs {why}. What its forward does was changed, such as an "
            f"activation; build it as it was. To load it all the same, remove {KEY!r} from "
            "config.json"
        )


def _form(value: Any, depth: int = 0) -> Any:
    """JSON that says how inputs look; None where something in them has no such form."""
    if isinstance(value, Tensor):
        form: dict[str, Any] = {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
        }
        if value.is_floating_point():
            return form
        if value.is_complex() or value.is_meta or not value.numel():
            return None
        return form | {"least": int(value.min()), "most": int(value.max())}
    if depth > _MOST_DEPTH:
        return None
    if isinstance(value, Mapping):
        parts = {str(key): _form(part, depth + 1) for key, part in value.items()}
        return None if None in parts.values() else {"named": parts}
    if type(value) in (tuple, list):
        listed = [_form(part, depth + 1) for part in value]
        kind = "tuple" if isinstance(value, tuple) else "list"
        return None if None in listed else {kind: listed}
    if isinstance(value, bool | int | str | None) or (
        isinstance(value, float) and math.isfinite(value)
    ):
        return {"value": value}
    return None


def _made(form: Any, chance: torch.Generator, noise: float, device: torch.device) -> Any:
    if "named" in form:
        named = sorted(form["named"].items())  # as the file has them, whose keys are sorted
        return {key: _made(part, chance, noise, device) for key, part in named}
    for key, kind in (("tuple", tuple), ("list", list)):
        if key in form:
            return kind(_made(part, chance, noise, device) for part in form[key])
    if "value" in form:
        return form["value"]
    dtype, shape = getattr(torch, form["dtype"]), form["shape"]
    if "least" in form:
        made = torch.randint(form["least"], form["most"] + 1, shape, generator=chance)
    else:
        made = torch.randn(shape, generator=chance) * (1 + noise)
    return made.to(device, dtype)


def _outputs(model: nn.Module, form: Any, *, seed: int, noise: float = 0.0) -> list[list[float]]:
    """Some numbers of each output, and last their mean size; ``seed`` is that of the model."""
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    inputs = _made(form, torch.Generator().manual_seed(0), noise, device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with isolated(model), torch.no_grad():
            torch.manual_seed(seed)
            result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
            return [_digest(output) for output in _leaves(result) if output.is_floating_point()]
    finally:
        for module in training:
            module.training = True


def _digest(output: Tensor) -> list[float]:
    flat = output.detach().double().cpu().flatten()
    if not len(flat):
        return []
    places = torch.linspace(0, len(flat) - 1, min(_NUM_SHOWN, len(flat))).round().long()
    numbers = [*flat[places].tolist(), flat.abs().mean().item()]
    return [float(f"{number:.6g}") for number in numbers]


def _differs(told: list[list[float]], given: list[list[float]], tolerance: float) -> str:
    """In what they differ; empty where they are the same."""
    if len(told) != len(given):
        return f"it has {len(given)} outputs, not {len(told)}"
    for number, (expected, found) in enumerate(zip(told, given, strict=True)):
        if len(expected) != len(found):
            return f"output {number} has another size"
        scale = max([*map(abs, expected), 1e-6])
        off = max([abs(a - b) for a, b in zip(expected, found, strict=True)], default=0.0)
        if not off <= tolerance * scale:
            return f"output {number} is off by {off / scale:.1%} of its largest value"
    return ""


def _tolerance(model: nn.Module) -> float:
    kinds = {each.dtype for each in model.parameters() if each.is_floating_point()}
    return max((_TOLERANCE.get(kind, _HALF_TOLERANCE) for kind in kinds), default=2e-3)


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _leaves(vars(value))


def _read(record: Any) -> tuple[Any, list[list[float]]]:
    """Form and numbers of a stranger's file.

    Raises:
        CheckpointError: Neither is what `check_of` makes.
    """
    try:
        form, told = record["inputs"], record["outputs"]
        _check_form(form, [0, 0])
        if not all(type(x) in (int, float) and math.isfinite(x) for part in told for x in part):
            raise ValueError("numbers that are none")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"config.json: {KEY}: not what save_pretrained writes ({error})"
        ) from None
    return form, told


def _check_form(form: Any, seen: list[int], depth: int = 0) -> None:
    if depth > _MOST_DEPTH + 1 or not isinstance(form, dict):
        raise ValueError("nested too deeply, or no object")
    seen[0] += 1
    for part in (*form.get("named", {}).values(), *form.get("tuple", ()), *form.get("list", ())):
        _check_form(part, seen, depth + 1)
    if "dtype" in form:
        if not isinstance(getattr(torch, form["dtype"], None), torch.dtype):
            raise ValueError("no type of numbers")
        sizes = form["shape"]
        if not all(type(size) is int and 0 <= size <= _MOST_VALUES for size in sizes):
            raise ValueError("sizes that are none")
        seen[1] += math.prod(sizes)
        bounds = form.get("least", 0), form.get("most", 0)
        if not all(type(bound) is int and abs(bound) < 2**63 - 1 for bound in bounds):
            raise ValueError("bounds that are none")
        if bounds[0] > bounds[1]:
            raise ValueError("bounds that are none")
    elif not form.keys() & {"named", "tuple", "list", "value"}:
        raise ValueError("no form of an input")
    if seen[0] > 4 * _MOST_LEAVES or seen[1] > _MOST_VALUES:
        raise ValueError("inputs that are too large")
