"""Proof at save time: what the files will build is the model that was saved."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.checkpoint.format.standins import has_standins
from sosp_hub.compat.torch import buffer_table
from sosp_hub.compat.transformers import cache_in, find_cache
from sosp_hub.errors import CheckpointError
from sosp_hub.structure.copies import map_tensors
from sosp_hub.structure.deferred import WhereRead, at_once
from sosp_hub.structure.isolation import isolated
from sosp_hub.surgery.verification.steps import steps_taken
from sosp_hub.surgery.verification.twins import doubled, is_coarse

OTHER_OUTPUT = (
    "{}: the config and the delta build a model of the same shapes that computes something else; "
    "an attribute was changed that is no number"
)
OTHER_CACHED = (
    "{}: where a module was taken out, the installed library cannot generate with a key-value "
    "cache (`python -m sosp_hub.doctor` says which version was tested)"
)
_TOLERANCE = 1e-6  # of the largest output
_ROUNDING = 1e-5  # of the largest output, where sums have other lengths


def check_tensors(rebuilt: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Compares the names and shapes of a rebuilt model's tensors with what will be written.

    Raises:
        CheckpointError: Names the first tensor that differs.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in rebuilt.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise CheckpointError(
                f"tensor {name!r}: the model holds {given.get(name)}, "
                f"the files would build {expected.get(name)}"
            )


def changed_buffers(rebuilt: nn.Module, model: nn.Module) -> list[str]:
    """Buffers outside the state dict that the rebuilt model computes differently.

    Args:
        rebuilt: With data in its buffers.
        model: The pruned model.
    """
    kept = model.state_dict(keep_vars=True).keys()
    ours = dict(rebuilt.named_buffers())
    return [
        name
        for name, buffer in model.named_buffers()
        if name not in kept and not (name in ours and _same(buffer, ours[name]))
    ]


def stored_buffers(rebuilt: nn.Module, model: nn.Module) -> list[str]:
    """Buffers in the model's state that are there, but in no state, of the rebuilt model."""
    kept, others = model.state_dict(keep_vars=True).keys(), rebuilt.state_dict(keep_vars=True)
    ours = dict(rebuilt.named_buffers())
    return [
        name
        for name, _ in model.named_buffers()
        if name in kept and name in ours and name not in others
    ]


def adopt(rebuilt: nn.Module, model: nn.Module) -> None:
    """Gives a rebuilt model the weights and buffers of ``model``; nothing is copied."""
    rebuilt.load_state_dict(model.state_dict(), strict=False, assign=True)
    theirs = dict(model.named_buffers())
    for name, module in rebuilt.named_modules():
        for key in (table := buffer_table(module)):
            if (full := f"{name}.{key}".lstrip(".")) in theirs:
                table[key] = theirs[full]
    if callable(tie := getattr(rebuilt, "tie_weights", None)):
        tie()


def adopt_dtypes(rebuilt: nn.Module, model: nn.Module) -> None:
    """Gives a model of other sizes the device of ``model`` and, tensor by tensor, its dtypes.

    Angles of positions are in float32 in a model that was loaded in half precision, and are not in
    one that was converted.
    """
    first = next(model.parameters())
    theirs = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, parameter in rebuilt.named_parameters(remove_duplicate=False):
        parameter.data = parameter.data.to(first.device, theirs.get(name, first).dtype)
    for name, buffer in rebuilt.named_buffers():
        buffer.data = buffer.data.to(first.device, theirs.get(name, buffer).dtype)


def same_function(
    rebuilt: nn.Module, model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]
) -> bool:
    """Whether a model of other sizes computes the same, but for rounding.

    What is left of 16 bits by sums of other lengths tells nothing: such models are compared in
    double precision.

    Args:
        rebuilt: The other model, with the dtypes of ``model``.
        model: The pruned model; left as it was.
        inputs: Keyword or positional arguments of a forward pass.
    """
    if same_output(rebuilt, model, inputs, _ROUNDING):
        return True
    if not is_coarse(model):
        return False
    wide = map_tensors(inputs, lambda t: t.double() if t.is_floating_point() else t)
    for with_copies in (contextlib.nullcontext, at_once):  # code may read more than operations do
        with with_copies(), WhereRead():
            if same_output(doubled(rebuilt), doubled(model), wide, _ROUNDING):
                return True
    return False


def same_output(
    rebuilt: nn.Module,
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    relative: float = _TOLERANCE,
) -> bool | None:
    """Whether both models compute the same; None where ``model`` cannot run the inputs.

    Args:
        rebuilt: Another model with the weights of ``model``.
        model: The pruned model; left as it was.
        inputs: Keyword or positional arguments of a forward pass.
        relative: Largest difference that passes, in units of the largest output.
    """
    with isolated(model, rebuilt), _eval(model), _eval(rebuilt), torch.no_grad():
        torch.manual_seed(0)  # of models that draw in evaluation too
        try:
            expected = _tensors(_run(model, inputs))
        except Exception:  # noqa: BLE001 - inputs that we made up; the caller does without
            return None
        torch.manual_seed(0)
        try:
            given = _tensors(_run(rebuilt, inputs))
        except Exception:  # noqa: BLE001 - whatever its code raises, it is not the same model
            return False
    return len(given) == len(expected) and all(
        _close(a, b, relative) for a, b in zip(given, expected, strict=True)
    )


def same_steps(rebuilt: nn.Module, model: nn.Module, inputs: Any) -> bool:
    """Whether models without weights take the same steps, with the same shapes and numbers.

    Args:
        rebuilt: Of the same shapes.
        model: The pruned model.
        inputs: Keyword or positional arguments of a forward pass.
    """
    return steps_taken(rebuilt, inputs) == steps_taken(model, inputs)


def with_data(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state that are not on the meta device."""
    return {name: tensor for name, tensor in state.items() if not tensor.is_meta}


def check_cache(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...] | None) -> None:
    """Compares one step with a key-value cache and the same step without, on padded tokens.

    What stands where a module was taken out has to keep the cache in step, and gets it under a name
    that libraries change. Nothing is run where nothing was taken out, or where no cache is kept.

    Args:
        model: Any model, left as it was.
        inputs: Arguments of a forward pass.

    Raises:
        CheckpointError: The outputs differ, the step fails, or the cache is not to be found.
    """
    if not has_standins(model) or not isinstance(inputs, Mapping):
        return
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    config: Any = getattr(model, "config", None)
    if name not in inputs or not hasattr(config, "use_cache"):
        return
    failed = OTHER_CACHED.format(type(model).__name__)
    tokens: Tensor = inputs[name]
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    runs: Callable[..., Any] = model

    def run(tokens: Tensor, **kwargs: Any) -> Any:
        padded = {} if name == "decoder_input_ids" else {"attention_mask": mask}
        if kwargs.pop("without_last", False):
            padded = {key: value[:, :-1] for key, value in padded.items()}
        return runs(**{**inputs, name: tokens, **padded, **kwargs})

    with _eval(model), torch.no_grad():
        try:
            expected = _tensors(run(tokens, use_cache=False))[0][:, -1]
        except Exception:  # noqa: BLE001 - inputs that we made up; the caller does without
            return
        try:
            held = cache_in(run(tokens[:, :-1], use_cache=True, without_last=True))
            if not held and not _must_cache(model):
                return
            given = _tensors(run(tokens[:, -1:], use_cache=True, **held))[0][:, -1]
        except Exception as error:
            raise CheckpointError(f"{failed}: {error}") from error
    counted = [int(find_cache([cache]).get_seq_length()) for cache in held.values()]
    difference = (given - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    noise = max(1e-3, 16 * torch.finfo(expected.dtype).eps)
    if counted != [tokens.shape[1]] or not difference <= noise:
        raise CheckpointError(
            f"{failed}: it counts {counted or 'no'} of "
            f"{tokens.shape[1]} tokens, and its output is off by {float(difference):.1e} (relative)"
        )


def cached_sizes(model: nn.Module, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """KV heads and their size in each layer of the cache that one forward pass leaves.

    A layer without keys has ``(0, 0)``; empty where the pass fails or leaves no cache.
    """
    with _eval(model), torch.no_grad():
        try:
            output = _run(model, {**inputs, "use_cache": True})
        except Exception:  # noqa: BLE001 - inputs that we made up; the caller does without
            return []
    caches = [find_cache([cache]) for cache in cache_in(output).values()]
    if len(caches) != 1:
        return []
    layers = [getattr(layer, "keys", None) for layer in getattr(caches[0], "layers", ())]
    return [
        (keys.shape[1], keys.shape[3]) if isinstance(keys, Tensor) and keys.dim() == 4 else (0, 0)
        for keys in layers
    ]


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Builds modules whose parameters have no data and whose buffers have."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def _must_cache(model: nn.Module) -> bool:
    can_generate = getattr(model, "can_generate", lambda: False)
    return bool(can_generate() and getattr(getattr(model, "config", None), "is_decoder", True))


def _run(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> Any:
    call: Callable[..., Any] = model
    return call(**inputs) if isinstance(inputs, Mapping) else call(*inputs)


@contextlib.contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [each for each in values if isinstance(each, Tensor)]


def _same(a: Tensor, b: Tensor) -> bool:
    b = b.to(a.device, a.dtype)
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _close(a: Tensor, b: Tensor, relative: float) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return not a.numel() or bool((a - b).abs().max() <= relative * b.abs().max().clamp(min=1e-6))
