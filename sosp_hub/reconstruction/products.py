"""Catches the products of weights with what they read, whatever module's code makes them."""

import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sosp_hub.structure.modes import body_of
from sosp_hub.tasks.batches import num_samples, tensors

_PLACES = 64
"""Positions of an image, at random, at which a convolution's inputs are looked at; more where that
makes too few rows for its inputs."""
_ROWS_PER_INPUT = 16


class Product(NamedTuple):
    """One product of a watched weight.

    A weight is a row of matrices ``(slots, outputs, inputs)``: one for a linear layer, one for each
    group of a convolution or each expert.

    Attributes:
        tensor: Name of the weight.
        slots: Which of its matrices take part.
        rows: ``(slots, rows, inputs)`` in float32 or wider: what they are multiplied with.
        keys: Of the sample that each row is of; None where that is not known.
        bias: What is added to the product.
        groups: Of a convolution; 0 = it is none.
        taps: Positions of a convolution's window.
    """

    tensor: str
    slots: slice
    rows: Tensor
    keys: Tensor | None = None
    bias: Tensor | None = None
    groups: int = 0
    taps: int = 1


class Watched(NamedTuple):
    """A weight whose products are caught.

    Attributes:
        weight: It itself.
        dim: The dimension that they sum over.
        size: Of that before the cut: a convolution looks at as many places before as after it.
    """

    weight: Tensor
    dim: int
    size: int


class Products(TorchFunctionMode):
    """Hands each product of a watched weight to ``see`` before it is computed.

    Args:
        watched: Weights by name.
        see: Gets each product.
        refuse: Gets the name of a weight that is read in a way that is not understood, and how.
        num_samples: Samples of all batches: where they are few, more positions of each image are
            looked at.
    """

    def __init__(
        self,
        watched: Mapping[str, Watched],
        see: Callable[[Product], None],
        refuse: Callable[[str, str], None],
        num_samples: int,
    ) -> None:
        super().__init__()
        self._names = {w.weight.untyped_storage().data_ptr(): n for n, w in watched.items()}
        self._watched, self._see, self._refuse = watched, see, refuse
        self._all_samples = num_samples
        self._gathered: dict[int, tuple[weakref.ref[Tensor], str, Tensor]] = {}
        self.keys: Sequence[int] = (0,)
        self.mask: Tensor | None = None

    def begin(self, keys: Sequence[int], mask: Tensor | None) -> None:
        """Another batch is coming.

        Args:
            keys: A number for each sample that says by itself what is drawn at random for it, so
                that batches and processes make no difference.
            mask: Which of its tokens are not padding.
        """
        self.keys, self.mask = keys, mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            with self:
                return body_of(func)(*args, **kwargs)
        order = _ARGUMENTS.get(name)
        if order is not None:
            given: dict[str, Any] = {**dict(zip(order, args, strict=False)), **kwargs}
            if name in _EITHER_WAY:
                given = {_OPERANDS.get(key, key): value for key, value in given.items()}
                left, right = given["input"], given["weight"]
                if self._is_watched(left) and not self._is_watched(right):
                    name, given = "linear", {"weight": left, "input": _as_rows(right)}
            weight = given.get("weight")
            if isinstance(weight, Tensor) and type(weight) in (Tensor, torch.nn.Parameter):
                tensor = self._names.get(weight.untyped_storage().data_ptr())
                if tensor is not None:
                    with torch.no_grad():
                        self._product(tensor, name, given)
            if name == "bmm" and self._gathered:
                first, second = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
                self._gathered_product(first, second)
        result = func(*args, **kwargs)
        if name == "__getitem__":
            self._note_gathered(args[0], args[1], result)
        return result

    def _is_watched(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self._names

    def _note_gathered(self, parameter: Any, numbers: Any, result: Any) -> None:
        """Remembers a tensor that holds for each row the matrix of its expert."""
        if not isinstance(parameter, torch.nn.Parameter) or parameter.dim() != 3:
            return
        tensor = self._names.get(parameter.untyped_storage().data_ptr())
        if tensor is None or not isinstance(numbers, Tensor) or numbers.dim() != 1:
            return
        if not numbers.is_floating_point() and numbers.dtype != torch.bool:
            self._gathered[id(result)] = weakref.ref(result), tensor, numbers

    def _gathered_product(self, first: Tensor, second: Tensor) -> None:
        """Of rows with the matrices of their experts, as each comes with its own."""
        for weight, rows, side in ((first, second, -1), (second, first, -2)):
            reference, tensor, numbers = self._gathered.get(id(weight), (None, "", None))
            if reference is None or reference() is not weight or numbers is None:
                continue
            dim = self._watched[tensor].dim
            rows = rows.squeeze(-1 if side == -1 else 1)
            if weight.is_complex():
                self._refuse(tensor, "it holds complex numbers")
                continue
            if rows.dim() != 2 or dim != 3 + side:
                self._refuse(tensor, "a product of it with more than a row for each expert")
                continue
            for slot in numbers.unique().tolist():
                mine = _wide(rows[numbers == slot])[None]
                self._see(Product(tensor, slice(slot, slot + 1), mine))

    def _product(self, tensor: str, name: str, given: Mapping[str, Any]) -> None:
        weight, x, bias = given["weight"], given["input"], given.get("bias")
        parameter, dim, size = self._watched[tensor]
        if weight.is_complex():
            self._refuse(tensor, "it holds complex numbers")
            return
        if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
            self._refuse(tensor, f"{name} scales what it adds up")
            return
        if name.startswith("conv"):
            if weight.shape != parameter.shape or dim != ("transpose" not in name):
                self._refuse(tensor, "a convolution reads a part of it")
                return
            groups, taps = given.get("groups", 1), weight[0, 0].numel()
            x = x if x.dim() == weight.dim() else x.unsqueeze(0)
            name_key, keys = zlib.crc32(tensor.encode()), self._keys(len(x))
            seeds = range(len(x)) if keys is None else keys.tolist()
            num_inputs = (size // groups if dim == 0 else size) * taps
            enough = _ROWS_PER_INPUT * num_inputs // max(self._all_samples, 1)
            if dim == 0:
                x, given = _as_convolution(x, weight, given)
            rows = patches(x, weight, given, max(_PLACES, enough), [s ^ name_key for s in seeds])
            keys = self._keys(rows.shape[1])
            self._see(Product(tensor, slice(None), _wide(rows), keys, bias, groups, taps))
            return
        side = -1 if name == "linear" else -2
        if not _whole(weight, parameter, dim, side):
            self._refuse(tensor, f"{name} reads a part of it")
            return
        if name.endswith("grouped_mm"):
            ends = given["offs"].tolist()
            for slot, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                if end > start:
                    rows = _wide(x[start:end])[None]
                    self._see(Product(tensor, slice(slot, slot + 1), rows))
            return
        if weight.dim() == 3:
            if x.dim() != 3:
                self._refuse(tensor, f"{name} of a tensor of {x.dim()} dimensions")
                return
            self._see(Product(tensor, slice(None), _wide(x)))
            return
        slots = slice(0, 1)
        if parameter.dim() == 3:
            slot = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
            slots = slice(slot, slot + 1)
        shape, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
        keys = self._keys(len(x))
        mask = self.mask
        if mask is not None and mask.numel() == len(x) and shape in (mask.shape, (len(x),)):
            real = mask.flatten().to(x.device).bool()
            x, keys = x[real], None if keys is None else keys[real.cpu()]
        self._see(Product(tensor, slots, _wide(x)[None], keys, bias))

    def _keys(self, num_rows: int) -> Tensor | None:
        each, rest = divmod(num_rows, len(self.keys))
        return None if rest else torch.tensor(self.keys, device="cpu").repeat_interleave(each)


def sample_keys(batch: Any) -> list[int]:
    """A number for each sample, of what is in it alone, padding left out."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    size = num_samples(batch)
    first = next(tensor for tensor in tensors(batch) if tensor.ndim and len(tensor) == size)
    first = first.detach().cpu()
    keys = []
    for i, sample in enumerate(first):
        if isinstance(mask, Tensor) and mask.shape == first.shape:
            sample = sample[mask[i].cpu().bool()]
        keys.append(zlib.crc32(sample.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()))
    return keys


_ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("bias", "input", "weight"),
    "mm": ("input", "weight"),
    "bmm": ("input", "weight"),
    "matmul": ("input", "weight"),
    "__matmul__": ("input", "weight"),
    "_grouped_mm": ("input", "weight", "offs"),
    "grouped_mm": ("input", "weight"),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d"),
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    ),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    ),
}


_EITHER_WAY = ("mm", "matmul", "__matmul__")
"""Products in which the weight may stand on the left."""
_OPERANDS = {"other": "weight", "mat2": "weight"}
"""What keywords of these are called here."""


def _as_rows(columns: Tensor) -> Tensor:
    """What a matrix is multiplied with, as the inputs of a linear layer."""
    return columns.mT if columns.dim() > 1 else columns[None]


def _whole(weight: Tensor, parameter: Tensor, dim: int, side: int) -> bool:
    """Whether an operand is one or all matrices of a parameter, with its inputs along ``side``."""
    if parameter.dim() not in (2, 3) or dim < parameter.dim() - 2 or weight.dim() < 2:
        return False
    other = 2 * parameter.dim() - 3 - dim
    sizes = {-1: (other, dim), -2: (dim, other)}[side]
    last = tuple(parameter.shape[d] for d in sizes), tuple(parameter.stride(d) for d in sizes)
    if (tuple(weight.shape[-2:]), tuple(weight.stride()[-2:])) != last:
        return False
    return weight.dim() == 2 or (weight.dim() == 3 and weight.shape[0] == parameter.shape[0])


def _as_convolution(
    x: Tensor, weight: Tensor, given: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Any]]:
    """Input and arguments of the convolution that computes the same as a transposed one.

    It reads zeros between the places of the input, and its window is the other way round.
    """
    num = weight.dim() - 2
    names = ("stride", "dilation", "padding", "output_padding")
    stride, dilation, padding, more = (
        _each(given.get(name, default), num)
        for name, default in zip(names, (1, 1, 0, 0), strict=True)
    )
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    wide[(..., *(slice(None, None, s) for s in stride))] = x
    pads: list[int] = []
    for i in reversed(range(num)):
        edge = dilation[i] * (weight.shape[2 + i] - 1) - padding[i]
        pads += [edge, edge + more[i]]
    return F.pad(wide, pads), {"dilation": dilation, "groups": given.get("groups", 1)}


def patches(
    x: Tensor,
    weight: Tensor,
    given: Mapping[str, Any],
    places: int,
    seeds: Sequence[int],
) -> Tensor:
    """What a convolution multiplies its weights with: ``(groups, samples * places, inputs)``.

    Args:
        x: Its input.
        weight: Its weight.
        given: Its other arguments.
        places: Most positions of a sample.
        seeds: For each sample, which it takes of more.
    """
    num = weight.dim() - 2
    groups = given.get("groups", 1)
    stride, dilation = (_each(given.get(key, 1), num) for key in ("stride", "dilation"))
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    padding = given.get("padding", 0)
    if padding == "same":
        pads = [(r // 2, r - r // 2) for r in reach]
    else:
        pads = [(p, p) for p in _each(0 if padding == "valid" else padding, num)]
    if any(sum(pair) for pair in pads):
        x = F.pad(x, [p for pair in reversed(pads) for p in pair])
    for i in range(num):
        x = x.unfold(2 + i, reach[i] + 1, stride[i])
    window = (slice(None, None, d) for d in dilation)
    x = x[(..., *window)]
    sizes = x.shape[2 : 2 + num]
    total = sizes.numel()
    chosen = torch.arange(total, device="cpu").expand(len(x), -1)
    if total > places:
        draws = (torch.randperm(total, generator=_generator(s), device="cpu") for s in seeds)
        chosen = torch.stack([draw[:places] for draw in draws])
    at = torch.unravel_index(chosen.to(x.device), sizes)
    samples = torch.arange(len(x), device=x.device)[:, None]
    x = x[(samples, slice(None), *at)]  # (samples, places, channels, window)
    x = x.flatten(3).unflatten(2, (groups, -1))
    return x.permute(2, 0, 1, 3, 4).flatten(3).flatten(1, 2)


def _generator(seed: int) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(seed)
    return generator


def _each(value: int | Sequence[int], num: int) -> tuple[int, ...]:
    return (value,) * num if isinstance(value, int) else tuple(value) * (num // len(value))


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def to_matrices(weight: Tensor, dim: int, groups: int) -> Tensor:
    """A weight as ``(slots, outputs, inputs)``; of a convolution each input has its window.

    A transposed convolution, whose inputs are dimension 0, has its window the other way round.
    """
    if groups and dim == 0:
        turned = weight.flip(tuple(range(2, weight.dim())))
        return turned.unflatten(0, (groups, -1)).transpose(1, 2).flatten(3).flatten(2)
    if groups:
        return weight.unflatten(0, (groups, -1)).flatten(3).flatten(2)
    matrices = weight.movedim(dim, -1)
    return matrices if weight.dim() == 3 else matrices[None]


def from_matrices(matrices: Tensor, like: Tensor, dim: int, groups: int) -> Tensor:
    """The opposite of ``to_matrices``, in the shape of ``like``."""
    if groups and dim == 0:
        window = like.shape[2:]
        channels = matrices.unflatten(2, (-1, window.numel())).transpose(1, 2).flatten(0, 1)
        return channels.unflatten(2, window).flip(tuple(range(2, like.dim())))
    if groups:
        return matrices.reshape(like.shape)
    return (matrices if like.dim() == 3 else matrices[0]).movedim(-1, dim)
