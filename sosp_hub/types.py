"""Names that every room shares. Importing this file loads neither torch nor transformers."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["channel", "head", "kv_group", "head_dim", "neuron", "residual", "expert", "layer"]
"""What a structure is. ``residual`` is a channel of a stream that a normalisation runs over."""

BlockKind = Literal["attention", "mlp", "layer"]
"""What can go as a whole: a layer, or what it adds by its attention or its MLP."""

TABLE_SUFFIXES = {".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"}
"""Files of texts and tables that are read as data."""

DEFAULT_KINDS: tuple[Kind, ...] = ("channel", "head", "kv_group", "neuron")
"""What may go unless somebody says otherwise."""

GateKind = Literal["activation", "weight"]
"""What a gate multiplies. ``activation``: what is read at the group's sites. ``weight``: the
filters that make its slices, as in the literature."""

Mode = Literal["exact", "differences", "auto"]
"""How second derivatives are taken. ``exact``: double backward. ``differences``: central
differences of the gradient, which need no second derivative of any kernel. ``auto``: exact, and
differences where a kernel has none or memory does not suffice for that of a single sample."""

OutputLoss = Literal["auto", "cross_entropy", "squared"]
"""Which curvature by the outputs: the loss's own, or another whatever the loss."""

Library = Literal["timm", "transformers"]

Inputs = "tuple[Any, ...] | Mapping[str, Any]"
"""Positional or keyword arguments of one forward pass: tensors, and lists and dicts of them."""

Batch = "tuple[Any, Any] | Mapping[str, Any]"
"""``(inputs, targets)``, or a dict as a transformers model takes it (labels under ``labels``), a
dataclass or a named tuple with such fields. Inputs and targets are tensors, or lists, tuples and
dicts of them; lists of images and of a dict each are what torchvision's detectors take."""

if TYPE_CHECKING:
    Batches = Iterable[tuple[Any, Any] | Mapping[str, Any]]
    LossFn = Callable[[Any, Any], Any]
    Saliency = dict[str, Tensor]
