"""``trace``: one forward pass, and what it shows of which slices must be cut together."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sosp_hub.compat.torch import FAKE_LOG, SHARDED, FakeMode, unwrapped
from sosp_hub.compat.versions import tell_newer
from sosp_hub.errors import TraceError
from sosp_hub.modes import collector_paused, in_own_modes
from sosp_hub.structure import rules
from sosp_hub.structure import traced_int as ints
from sosp_hub.structure.axes import Axis, Sum, atoms, fixed, free, pin
from sosp_hub.structure.build_graph import assemble
from sosp_hub.structure.copies import copy_inputs
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.inputs import num_samples, one_sample, plain_inputs
from sosp_hub.structure.isolation import isolated
from sosp_hub.structure.modes import DispatchWatch, FunctionWatch, ReadOnly
from sosp_hub.structure.plain import plain_sizes
from sosp_hub.structure.shadow import shadow
from sosp_hub.structure.terms import AS_OUTPUT, Axes, Terms

Program = Callable[[nn.Module, Any], Any]
Wanted = tuple[str | int, ...] | None
"""Outputs that matter, by name or position; None = all."""

Run = tuple[nn.Module, Terms, dict[str, Axes], dict[str, Axes]]

_FAKE_LOG = logging.getLogger(FAKE_LOG)


@in_own_modes
def trace(
    model: nn.Module,
    example_inputs: Any,
    outputs: str | int | Sequence[str | int] | None = None,
    *,
    fake: bool = True,
    program: "Program | None" = None,
    cost_inputs: Any = None,
) -> Graph:
    """Finds the groups of slices of a model that must be cut together.

    The model itself is not run and not changed: a copy without data is (FakeTensors), or a real
    copy where its code looks at values. The pass is the evaluation pass, whatever mode the model
    is in. Where that leaves parameters unused, a training pass shows what they belong to.

    Args:
        model: Any module; weights may be on the meta device. Of what DataParallel,
            DistributedDataParallel or ``torch.compile`` made, it is the model inside.
        example_inputs: Positional arguments as a tuple, or keyword arguments as a dict: tensors,
            or lists, tuples and dicts of them. The first dimension of the first tensor counts
            samples, or, of a list of images (C, H, W), its entries.
        outputs: The outputs that matter, by name (``"logits"``) of a mapping, named tuple or
            dataclass, or by position in a tuple; other outputs may then change their size. None
            keeps the size of all of them.
        fake: Try without data first; False runs a real copy at once.
        program: Runs a copy of the model on copies of the inputs; None = one call.
        cost_inputs: Inputs of the size that multiply-accumulates are counted for, such as texts of
            full length; they are traced too, and verification still runs the example inputs. None
            = the example inputs.

    Raises:
        TraceError: Not a module, inputs that do not fit the model, or a forward pass that cannot
            be followed.

    Example:
        >>> import sosp_hub, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = sosp_hub.trace(net, (torch.randn(1, 4),))
        >>> graph.groups["0:neuron"].size
        8
    """
    tell_newer()
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace: the model must be an nn.Module, got {type(model).__name__}")
    if type(model).__name__ == SHARDED:
        raise TraceError(
            f"trace: {SHARDED} holds parts of parameters that belong to no layer; cut the model "
            "first and wrap it afterwards"
        )
    model = unwrapped(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"trace: {repr(name) if name else 'the model'} is TorchScript, whose code cannot "
                "be followed; give the module that it was compiled from"
            )
    if isinstance(outputs, str | int):
        outputs = (outputs,)
    wanted = None if outputs is None else tuple(outputs)
    example_inputs, cost_inputs = plain_inputs(example_inputs), plain_inputs(cost_inputs)
    samples = num_samples(example_inputs)
    if not samples:
        raise TraceError(
            f"example inputs hold no sample, got {describe(example_inputs)}; give one or two"
        )
    with collector_paused():
        twin, terms, entries, exits = _run(model, example_inputs, wanted, fake, program or call)
        graph = assemble(twin, terms, (entries, exits), example_inputs, wanted, samples)
    graph = dataclasses.replace(graph, plain=plain_sizes(model, graph.groups))
    if cost_inputs is None or one_sample(cost_inputs) == one_sample(example_inputs):
        return graph
    sized = trace(model, cost_inputs, outputs, fake=fake, program=program).sized
    return dataclasses.replace(graph, of_size=sized)


@contextmanager
def without_fake_log() -> Iterator[None]:
    """Torch prints what is reported here as an error, or tried with data."""
    _FAKE_LOG.disabled = True
    try:
        yield
    finally:
        _FAKE_LOG.disabled = False


def _run(
    model: nn.Module,
    inputs: Any,
    wanted: Wanted,
    fake: bool,
    program: "Program",
) -> Run:
    """One watched forward pass: without data where the code allows it, else with."""
    if not any(True for _ in rules.tensors(inputs)):
        raise TraceError(f"example inputs must hold at least one tensor, got {describe(inputs)}")
    has_data = not any(tensor.is_meta for tensor in model.parameters())
    if fake or not has_data:
        try:
            return _watch(model, inputs, wanted, FakeMode(), program)
        except TraceError:
            raise
        except Exception as error:
            if not has_data:
                raise TraceError(
                    f"the forward pass of {type(model).__name__} cannot be followed "
                    f"without its weights "
                    f"({type(error).__name__}: {error}); load the weights first"
                ) from error
    try:
        return _watch_with_data(model, inputs, wanted, program)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} does not run on the example inputs {describe(inputs)}: "
            f"{type(error).__name__}: {error}. "
            "Give a tuple of positional tensors or a dict of keyword tensors"
        ) from error


def describe(value: Any) -> str:
    """Shapes of nested tensors, for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(describe(item) for item in value) + ")"
    return repr(value)


def call(model: nn.Module, inputs: Any) -> Any:
    """Runs a model on positional (tuple, tensor) or keyword (mapping) inputs.

    Run it ``isolated``, and on copies of what a caller gave.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def wanted_outputs(result: Any, wanted: Wanted) -> Any:
    """The outputs that matter.

    Raises:
        TraceError: A name or a position that the model does not return.
    """
    if wanted is None:
        return result
    names = _names(result)
    positions = {} if isinstance(result, Mapping) else dict(enumerate(_values(result)))
    known = {**dict(zip(names, _values(result), strict=bool(names))), **positions}
    if strange := [each for each in wanted if each not in known]:
        has = ", ".join(names) or f"a {type(result).__name__} without names"
        if positions:
            has += f" of {len(positions)}: 0 to {len(positions) - 1}"
        raise TraceError(
            f"outputs: the model returns {has}; expected {', '.join(map(str, strange))}"
        )
    return {str(each): known[each] for each in wanted}


def output_tensors(result: Any) -> list[Tensor]:
    """All tensors a model returned, caches included."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for value in _values(result) for tensor in output_tensors(value)]


def _names(result: Any) -> list[str]:
    if isinstance(result, Mapping):
        return list(result)
    if dataclasses.is_dataclass(result):
        return list(vars(result))
    return list(getattr(result, "_fields", ()))


def _values(result: Any) -> list[Any]:
    """What is in a mapping, a sequence or a dataclass, in order."""
    if isinstance(result, Mapping):
        return list(result.values())
    if isinstance(result, tuple | list):
        return list(result)
    return list(vars(result).values()) if dataclasses.is_dataclass(result) else []


def _watch_with_data(model: nn.Module, inputs: Any, wanted: Wanted, program: "Program") -> Run:
    """A pass of a copy that shares the model's weights; of a whole one where it writes to them."""
    guard = ReadOnly(model)
    try:
        found = _watch(model, inputs, wanted, None, program, guard)
    except Exception:
        if not guard.refused:
            raise
    else:
        if not guard.refused:
            return found
    return _watch(model, inputs, wanted, None, program)


def _copied(model: nn.Module, fake: FakeMode | None, *, shared: bool) -> nn.Module:
    try:
        return shadow(model, fake, shared=shared)
    except Exception as error:
        if fake is not None:
            raise  # a copy with data is tried next
        raise TraceError(
            f"trace: this {type(model).__name__} cannot be copied, as its own copy.deepcopy(model) "
            f"would show ({type(error).__name__}: {error}); set what cannot be copied (a lock, a "
            "file, a generator) to None while it is cut, or give its holder a __deepcopy__"
        ) from error


def _watch(
    model: nn.Module,
    inputs: Any,
    wanted: Wanted,
    fake: FakeMode | None,
    program: "Program",
    guard: ReadOnly | None = None,
) -> Run:
    twin = _copied(model, fake, shared=guard is not None).eval()
    twin_inputs = copy_inputs(inputs, fake)
    terms = Terms()
    for name, tensor in _named_tensors(twin):
        if tensor in terms.axes:
            continue
        counted = tensor.is_floating_point() or tensor.is_complex()
        reason = f"`{name}` holds whole numbers"
        terms.axes[tensor] = tuple(
            free(int(s)) if counted else fixed(int(s), reason) for s in tensor.shape
        )
        if isinstance(tensor, nn.Parameter):
            terms.source[tensor] = name
    for tensor in rules.tensors(twin_inputs):
        terms.axes[tensor] = tuple(
            fixed(int(size), "an input of the model has this size") for size in tensor.shape
        )
    shapes = {name: buffer.shape for name, buffer in twin.named_buffers()}
    entries: dict[str, Axes] = {}
    exits: dict[str, Axes] = {}
    handles = list(_watch_modules(twin, terms, entries, exits))
    dispatch = DispatchWatch(terms)
    listener = ints.Listener(terms.leak, terms.compare, terms.hold, terms.lose)
    try:
        with (
            isolated(model),
            torch.no_grad(),
            without_fake_log(),
            ints.listening(listener),
            ExitStack() as modes,
        ):
            for mode in (fake, guard, dispatch, FunctionWatch(terms, dispatch)):
                if mode is not None:
                    modes.enter_context(mode)
            result = program(twin, twin_inputs)
            if unused := _unused(twin, terms):
                with dispatch.pause():
                    again = copy_inputs(inputs, fake)
                _follow_training(twin, again, terms, (entries, exits), unused, wanted)
    finally:
        for handle in handles:
            handle.remove()
    terms.refilled = {n for n, b in twin.named_buffers() if b.shape != shapes.get(n)}
    outputs = output_tensors(wanted_outputs(result, wanted))
    if not outputs:
        raise TraceError(
            f"{type(model).__name__} returns a {type(result).__name__} without a tensor, so that "
            "no cut of it could be compared; let its forward pass return tensors, in tuples, "
            "lists, dicts or dataclasses"
        )
    names = _names(result) or list(range(len(_values(result))))
    for name, value in zip(names, _values(result) if wanted is None else (), strict=False):
        terms.given[name] = [axis for each in output_tensors(value) for axis in terms.of(each)]
    for tensor in outputs:
        terms.use(tensor)
        for axis in terms.of(tensor):
            pin(axis, AS_OUTPUT)
        if tensor in terms.numbers:
            pin(terms.numbers[tensor], "an output of the model holds positions along it")
    return twin, terms, entries, exits


def _unused(model: nn.Module, terms: Terms) -> dict[str, str]:
    """Names of the parameters that no operation used, and the modules that own them."""
    return {
        name: name.rpartition(".")[0]
        for name, parameter in model.named_parameters()
        if name not in terms.touched and parameter.numel()
    }


def _follow_training(
    model: nn.Module,
    inputs: Any,
    terms: Terms,
    borders: tuple[dict[str, Axes], dict[str, Axes]],
    unused: dict[str, str],
    wanted: Wanted,
) -> None:
    """Lets modules that run in training only (auxiliary heads) be cut with what they read.

    Only what holds of them is kept: neither steps nor costs. Parameters that training does not use
    either keep their size.
    """
    steps, macs, reads, uses = len(terms.steps), len(terms.macs), len(terms.reads), dict(terms.uses)
    before, beside = [dict(border) for border in borders], terms.beside
    terms.beside = {}
    reason = "training does not use it either"
    try:
        result = call(model.train(), inputs)
        needed: list[Axis] = [Sum(terms.of(each)) for each in output_tensors(result)]
        with suppress(TraceError):  # in training it may give others than those that matter
            matter = output_tensors(wanted_outputs(result, wanted))
            needed = [Sum(terms.of(tensor)) for tensor in matter]
        evaluated = {
            atom.id
            for name, parameter in model.named_parameters()
            if name not in unused
            for axis in terms.of(parameter)
            for atom in atoms(axis)
        }
        for tensor in output_tensors(result):  # such as the classes of an auxiliary head
            needed += [a for a in atoms(Sum(terms.of(tensor))) if a.id not in evaluated]
        for axis in needed:
            pin(axis, "an output of the model in training has this size")
    except Exception as error:  # noqa: BLE001 - many models want labels, or more samples
        reason = f"training could not be followed ({type(error).__name__}: {error})"
    finally:
        model.eval()
        del terms.modules[1:], terms.steps[steps:], terms.macs[macs:]
        terms.reads[reads:] = [read for read in terms.reads[reads:] if read.tensor in unused]
        terms.uses.clear()
        terms.uses.update(uses)
        terms.beside = beside
        for border, old in zip(borders, before, strict=True):
            border.update(old)
    left = {name: owner for name, owner in unused.items() if name not in terms.touched}
    for name in left:
        for axis in terms.of(model.get_parameter(name)):
            pin(axis, f"evaluation does not use `{name.rpartition('.')[0] or name}`, and {reason}")
    terms.only_in_training = tuple(
        dict.fromkeys(owner for name, owner in unused.items() if name not in left)
    )
    terms.never_used = tuple(dict.fromkeys(left.values()))


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _watch_modules(
    model: nn.Module, terms: Terms, entries: dict[str, Axes], exits: dict[str, Axes]
) -> Iterator[RemovableHandle]:
    """Keeps the stack of running modules, and the axes of what each is given and gives first."""
    for name, module in model.named_modules():

        def enter(_: nn.Module, args: Any, name: str = name) -> None:
            terms.modules.append(name)
            terms.beside[name] = tuple(tuple(a.shape) for a in args[1:] if isinstance(a, Tensor))
            if args and isinstance(args[0], Tensor):
                entries[name] = terms.of(args[0])

        def leave(_: nn.Module, args: Any, kwargs: Any, result: Any, name: str = name) -> None:
            terms.modules.pop()
            given = {id(tensor) for tensor in rules.tensors((args, kwargs))}
            for position, tensor in enumerate(output_tensors(result)):
                if position == 0:
                    exits[name] = terms.of(tensor)
                elif id(tensor) in given:  # handed on as it is
                    continue
                terms.results[tensor] = (*(terms.results.get(tensor) or ()), (name, position))

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave, with_kwargs=True)
