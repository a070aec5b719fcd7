"""What the package uses of torch and torch does not promise.

Copied beside weights that carry their own code (``ship_code``), so it imports torch alone.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import batchnorm, conv, dropout
from torch.nn.modules.module import _WrappedHook
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode
from torch.utils.checkpoint import CheckpointError
from torch.utils.weak import WeakIdKeyDictionary as TensorTable

__all__ = ["DispatchMode", "TensorTable"]

aten = torch.ops.aten
"""Operations below Python's arguments."""

FAKE_LOG = "torch._subclasses.fake_tensor"
"""Logger that prints what goes wrong without data, before the error is raised."""

BatchNorm = batchnorm._BatchNorm
"""Class of all batch norms."""

RunningNorm = batchnorm._NormBase
"""Class of all norms that may keep running statistics."""

Convolution = conv._ConvNd
"""Class of all convolutions."""


Dropout = dropout._DropoutNd
"""Class of all dropouts."""


class FakeMode(FakeTensorMode):
    """Tensors without data, also for the experts of a mixture in any dtype.

    The shape function of ``aten._grouped_mm`` refuses float32 in some versions and odd sizes in
    others, although the product itself is computed for both. That of ``aten.mkldnn_rnn_layer``
    gives a workspace that is made in training alone.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _grouped_mm():
            return _grouped_shape(*args, **(kwargs or {}))
        out: Any = super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten.mkldnn_rnn_layer.default and not args[-1]:
            return (*out[:3], None)
        return out


def grouped_product_flops() -> dict[Any, Any]:
    """What `FlopCounterMode` has to be told of ``aten._grouped_mm``."""
    return {} if _grouped_mm() is None else {aten._grouped_mm: _grouped_flops}


def parameter_table(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters, to be replaced where they are, also by tensors of other kinds."""
    return module._parameters


def buffer_table(module: nn.Module) -> dict[str, Any]:
    """A module's own buffers, to be replaced where they are."""
    return module._buffers


def put_in(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a parameter or buffer in the place of the one of this name.

    Recurrent layers keep a list of their weights too, which follows assignments alone.
    """
    if isinstance(module, nn.RNNBase):
        setattr(module, name, tensor)
    else:
        table_of = parameter_table if isinstance(tensor, nn.Parameter) else buffer_table
        table_of(module)[name] = tensor


def child_table(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children, also those that are None, to be replaced where they are."""
    return module._modules


def forward_hook_table(module: nn.Module) -> dict[int, Any]:
    """What is called after a module's forward pass, by the number of its handle."""
    return module._forward_hooks


def save_buffer(module: nn.Module, name: str) -> None:
    """Makes a buffer part of the state dict."""
    module._non_persistent_buffers_set.discard(name)


def after_steps(call: Callable[..., None]) -> Any:
    """Has a function called with every optimizer after each of its steps; gives a handle."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    return register_optimizer_step_post_hook(call)


def has_hooks(parameter: nn.Parameter) -> bool:
    """Whether anything is called with a parameter's gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


_HOOK_TABLES = [
    name for name, table in vars(nn.Module()).items() if "hooks" in name and isinstance(table, dict)
]


def hook_tables(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """What is called with a module's passes and states, by number, of each kind of hook."""
    return {name: vars(module)[name] for name in _HOOK_TABLES}


def hook_inside(hook: Any) -> Any:
    """What the caller registered: torch wraps hooks that are called before states are loaded."""
    return hook.hook if isinstance(hook, _WrappedHook) else hook


def hook_for(function: Any, like: Any, module: nn.Module) -> Any:
    """A hook of a module that calls ``function``, wrapped as the hook ``like`` of another one."""
    if not isinstance(like, _WrappedHook):
        return function
    return _WrappedHook(function, module if like.with_module else None)


def num_writes(tensor: Tensor) -> int:
    """How often a tensor was changed in place; views count with what they show."""
    return tensor._version


def compiled_from(model: Any) -> Any:
    """What ``torch.compile`` made a model of; None where it did not."""
    return getattr(model, "_orig_mod", None)


def with_marks(new: nn.Parameter, old: Tensor) -> nn.Parameter:
    """The parameter with what code has noted on the one that it stands for, tensors left out.

    Such as ``_no_weight_decay``, by which trainings make their groups of parameters. What the
    parameter has already, as tensors of other classes have their own layout, stays.
    """
    for key, value in vars(old).items():
        if not isinstance(value, Tensor):
            vars(new).setdefault(key, value)
    return new


def unwrapped(model: Any) -> Any:
    """The model inside what ``torch.compile`` or a class for several devices made of it."""
    while True:
        inside = compiled_from(model)
        if inside is None and type(model).__name__ in _WRAPPERS:
            inside = getattr(model, "module", None)
        if not isinstance(inside, nn.Module):
            return model
        model = inside


SHARDED = "FullyShardedDataParallel"
"""Class that keeps the parameters of a model in parts that are nobody's tensors."""

_WRAPPERS = "DistributedDataParallel", "DataParallel", SHARDED


def is_sharded(model: nn.Module) -> bool:
    """Whether weights are spread over processes (FSDP2), which gather them for each pass.

    After a pass some of them may still be whole: the classes of the modules tell as well.
    """
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters()) or any(
        hasattr(module, "reshard") for module in model.modules()
    )


def forget_sharding(module: nn.Module) -> None:
    """Lets ``fully_shard`` take a module again, which it does once and has no way back from."""
    from torch.distributed._composable_state import _module_state_mapping

    _module_state_mapping.pop(module, None)


def eagerly() -> AbstractContextManager[Any]:
    """Has compiled modules run the code that they were made of."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and it is slow to import
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def operation(name: str) -> Any:
    """The operation that a dispatch mode names so, such as ``aten.view.default``; None if none."""
    space, *path = name.split(".")
    found: Any = getattr(torch.ops, space, None) if path else None
    for part in path:
        found = getattr(found, part, None)
    return found


def no_view(tensor: Tensor) -> Tensor:
    """The same values in the same memory, which count as no view: for what nothing else holds.

    A view that is made inside an autograd Function must not be written to after it.
    """
    return aten._unsafe_view(tensor, tensor.shape)


def result_aliases(func: Any) -> list[Any]:
    """How each result of an operation shares memory with its arguments; None where it does not."""
    schema = getattr(func, "_schema", None)
    return [] if schema is None else [value.alias_info for value in schema.returns]


def written_arguments(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors among its arguments that an operation writes to, ``out=`` and lists included."""
    positions, names = _written(func)
    given = [args[i] for i in positions if i < len(args)]
    for value in (*given, *(kwargs[name] for name in names if name in kwargs)):
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, Tensor):
                yield each


@cache
def _written(func: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Positions and names of the arguments that an operation's schema marks as written."""
    schema = getattr(func, "_schema", None)
    arguments = () if schema is None else schema.arguments
    marked = [
        (position, argument.name)
        for position, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tuple(position for position, _ in marked), tuple(name for _, name in marked)


def storage_key(tensor: Tensor) -> int:
    """One number for all tensors that lie in the same storage, also where that holds no data.

    It tells storages apart while both live. What has no storage (sparse) is alone.
    """
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return id(tensor)


def out_of_memory(error: BaseException) -> bool:
    """Whether it, or what caused it, says that memory does not suffice."""
    words = "can't allocate memory", "could not create a primitive"  # the CPU's, oneDNN's
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or any(each in str(error) for each in words)
        or (error.__cause__ is not None and out_of_memory(error.__cause__))
    )


RECOMPUTED_OTHERWISE: type[Exception] = CheckpointError
"""What ``torch.utils.checkpoint`` raises where a pass that is run again saves other tensors."""


def softmax_backward(grad: Tensor, output: Tensor) -> Tensor:
    """Gradient by the input of a softmax over the last dimension, from its output."""
    return aten._softmax_backward_data(grad, output, -1, output.dtype)


def safe_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; rows that hold nothing but ``-inf`` give zeros."""
    return aten._safe_softmax(scores, -1)


def _grouped_mm() -> Any:
    packet = getattr(aten, "_grouped_mm", None)
    return packet and packet.default


def _grouped_shape(
    left: Tensor, right: Tensor, offs: Tensor | None = None, *_: Any, **kwargs: Any
) -> Tensor:
    """An empty result; a matrix has its groups one behind the other, split at ``offs``."""
    groups = [] if {left.dim(), right.dim()} == {2, 3} else [(offs if left.dim() == 2 else left)]
    shape = (*(len(each) for each in groups if each is not None), left.shape[-2], right.shape[-1])
    return left.new_empty(shape, dtype=kwargs.get("out_dtype"))


def _grouped_flops(rows: tuple[int, ...], weights: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Every row meets one expert."""
    return 2 * rows[-2] * rows[-1] * weights[-1]


_PACKERS = ("torchao", "bitsandbytes")


def packed_weight(model: nn.Module) -> str | None:
    """Name and class of a model's first weight that another package has packed (quantised)."""
    for name, parameter in model.named_parameters():
        if type(parameter).__module__.partition(".")[0] in _PACKERS:
            return f"{name} is quantised ({type(parameter).__name__})"
    return None
