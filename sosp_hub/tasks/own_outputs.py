"""No labels: the loss is how far a model is from the dense model's outputs, or from its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.errors import DataError
from sosp_hub.tasks.batches import described
from sosp_hub.tasks.loss import forward
from sosp_hub.tasks.predictions import (
    Form,
    Predictions,
    at_least_float32,
    sigmoid,
    softmax,
    squared,
)


@dataclass(frozen=True, eq=False)
class OwnOutputs:
    """A ``loss_fn`` for any model and inputs alone: the divergence from the dense model's outputs.

    Without ``dense`` these are the outputs themselves as they are now, which is what scores a dense
    model: it is at its minimum, so that the gradient is zero and what ranks is the second order:
    `sosp_h`, `sosp_i`, `hap`. A model that was cut is trained and measured with ``dense``, which
    gets the inputs that are in the targets: in the dict of a batch, or as ``(inputs, inputs)``.

    Places that a batch's ``attention_mask`` leaves out do not count.

    Attributes:
        form: What the outputs are: ``softmax`` = logits of classes (the last dimension),
            ``sigmoid`` = logits of yes, ``squared`` = numbers, as of an embedding; None =
            ``softmax`` for an output that is called ``logits``, else ``squared``.
        output: Name or position of the output that counts; None = ``logits``, or what comes first.
        dense: The model whose outputs are the targets; None = the model itself.
    """

    form: Form | None = "softmax"
    output: str | int | None = None
    dense: nn.Module | None = None

    @property
    def at_minimum(self) -> bool:
        """Whether the gradient of the loss is zero everywhere."""
        return self.dense is None

    def __call__(self, outputs: Any, targets: Any) -> Predictions:
        """The loss of these outputs; of the batch's targets only the inputs are looked at."""
        values = one_output(outputs, self.output)
        aim = values.detach()
        if self.dense is not None:
            aim = one_output(dense_outputs(self.dense, targets), self.output).to(values.device)
        form = self.form
        if form is None:
            named = isinstance(outputs, Mapping) and values is outputs.get("logits")
            form = "softmax" if named and values.shape[-1] > 1 else "squared"
        counts = _counted(values, targets)
        if form == "softmax":
            return softmax(values, at_least_float32(aim).softmax(-1), weights=counts)
        if counts is not None:  # a mean over the places that count
            share = counts.shape[1] / counts.sum(1, keepdim=True).clamp(min=1)
            counts = (counts * share).view(*counts.shape, *[1] * (values.ndim - 2))
        if form == "sigmoid":
            return sigmoid(values, aim.sigmoid(), weights=counts)
        return squared(values, aim, weights=counts)


@torch.no_grad()
def dense_outputs(dense: nn.Module, targets: Any) -> Any:
    """What the dense model makes of the inputs that are in the targets of a batch."""
    return forward(dense, targets if isinstance(targets, Mapping) else (targets, targets))


def _counted(values: Tensor, targets: Any) -> Tensor | None:
    """1 for each place that counts, 0 for padding; None where all do."""
    mask = targets.get("attention_mask") if isinstance(targets, Mapping) else None
    if not isinstance(mask, Tensor) or values.ndim < 3 or mask.shape != values.shape[:2]:
        return None
    return mask.to(torch.promote_types(values.dtype, torch.float32))


def one_output(outputs: Any, output: str | int | None = None) -> Tensor:
    """The tensor that counts among a model's outputs.

    Args:
        outputs: As the model returned them.
        output: Its name or position; None = ``logits``, or the first floating-point tensor.

    Raises:
        DataError: There is no such output.
    """
    found: Any = None
    if isinstance(outputs, Tensor) and output in (None, 0):
        found = outputs
    elif isinstance(outputs, tuple | list) and not hasattr(outputs, "_fields"):
        number = 0 if output is None else output
        found = outputs[number] if isinstance(number, int) and number < len(outputs) else None
    elif output is None:
        named = outputs if isinstance(outputs, dict) else vars(outputs)
        floats = [v for v in named.values() if isinstance(v, Tensor) and v.is_floating_point()]
        found = named.get("logits", floats[0] if floats else None)
    elif isinstance(output, str):
        found = outputs.get(output) if isinstance(outputs, dict) else getattr(outputs, output, None)
    else:
        found = list(outputs.values())[output] if isinstance(outputs, dict) else outputs[output]
    if not isinstance(found, Tensor):
        raise DataError(
            f"the output {output!r} is no tensor of {described(outputs)}; give `output` as the "
            "name or position of one"
        )
    return found
