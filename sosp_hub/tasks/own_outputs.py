"""No labels: the loss is how far a model is from its own outputs, as they are now."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sosp_hub.errors import DataError
from sosp_hub.tasks.batches import described
from sosp_hub.tasks.predictions import Form, Predictions, sigmoid, softmax, squared


@dataclass(frozen=True)
class OwnOutputs:
    """A ``loss_fn`` for any model and inputs alone: the divergence from the model's own outputs.

    The dense model is at its minimum, so that the gradient is zero and what ranks is the second
    order: `sosp_h`, `sosp_i`, `hap`.

    Attributes:
        form: What the outputs are: ``softmax`` = logits of classes (the last dimension),
            ``sigmoid`` = logits of yes, ``squared`` = numbers, as of an embedding.
        output: Name or position of the output that counts; None = ``logits``, or what comes first.
    """

    form: Form = "softmax"
    output: str | int | None = None
    at_minimum: ClassVar[bool] = True

    def __call__(self, outputs: Any, targets: Any) -> Predictions:
        """The loss whose targets are these outputs; the batch's targets are not looked at."""
        del targets
        values = one_output(outputs, self.output)
        if self.form == "softmax":
            return softmax(values, values.detach().softmax(-1))
        if self.form == "sigmoid":
            return sigmoid(values, values.detach().sigmoid())
        return squared(values, values.detach())


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
