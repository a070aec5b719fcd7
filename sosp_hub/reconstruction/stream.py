"""Runs a model again and again on the same batches, each time on from where it is final."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from sosp_hub.reconstruction.products import Product, Products, Watched, sample_keys
from sosp_hub.reconstruction.refine import Call
from sosp_hub.structure.copies import copy_inputs, map_tensors
from sosp_hub.structure.trace import call, output_tensors
from sosp_hub.tasks.batches import tensors
from sosp_hub.tasks.loss import forward


class _Stop(Exception):  # noqa: N818 - no error: the rest of the pass is not needed
    pass


class Stream:
    """Passes of a model up to one of its weights after the other, in the order that they run.

    What a module with such weights gives is kept from the pass after its last weight became final,
    and handed out from then on; what such a module is given by a chain of others alone makes that
    of the others superfluous. So the model is run once in all, and each part of it once more for
    each of its weights.

    Args:
        model: A model of our own, in eval mode.
        watched: The weights by name.
        batches: What it is run on.
        chains: Names of modules each of which gives its result to the next one alone.
        example_inputs: What it was traced with: says in which order weights run.
        num_samples: Samples of the batches of all processes.

    Attributes:
        order: The weights in the order they run.
        refused: Why others are not followed, by name.
        first: A product of each weight.
        num_bytes: About what the largest result that is kept takes, for all batches.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: Mapping[str, Watched],
        batches: Sequence[Any],
        chains: Sequence[Sequence[str]],
        example_inputs: Any,
        num_samples: int,
    ) -> None:
        self._model, self._batches = model, batches
        self.refused: dict[str, str] = {}
        self.first: dict[str, Product] = {}
        self.order: list[str] = []
        self._watched, self._num_samples = watched, num_samples
        self._keys = [sample_keys(batch) for batch in batches]
        self._before = {
            later: list(chain[:i]) for chain in chains for i, later in enumerate(chain) if i
        }
        self._kept: dict[str, list[Any]] = {}
        self._record(watched, example_inputs)

    def _refuse(self, tensor: str, why: str) -> None:
        self.refused.setdefault(tensor, why)

    def _record(self, watched: Mapping[str, Watched], example_inputs: Any) -> None:
        """Runs the examples: the order of weights, and which modules come before which."""
        running: list[str] = [""]
        frame: dict[str, str] = {}
        left: list[str] = []
        sizes: dict[str, int] = {}

        def note(product: Product) -> None:
            self.first.setdefault(product.tensor, product)
            frame.setdefault(product.tensor, running[-1])

        products = Products(watched, note, self._refuse, self._num_samples)
        with ExitStack() as stack:
            for name, module in self._model.named_modules():

                def enter(*_: Any, name: str = name) -> None:
                    running.append(name)

                def leave(_: nn.Module, __: Any, result: Any, name: str = name) -> None:
                    running.pop()
                    left.append(name)
                    sizes[name] = sum(t.numel() * t.element_size() for t in output_tensors(result))

                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            device = next((p.device for p in self._model.parameters()), None)
            inputs = map_tensors(example_inputs, lambda tensor: tensor.to(device, copy=True))
            with products, torch.no_grad():
                call(self._model, inputs)
        self._calls = {name: left.count(name) for name in set(left)}
        self._frame = frame
        end = {name: max(i for i, other in enumerate(left) if other == name) for name in set(left)}
        self.refused |= {
            name: "it is read by an operation that is not followed"
            for name in watched
            if name not in frame and name not in self.refused
        }
        found = [name for name in frame if name not in self.refused]
        self.order = sorted(found, key=lambda name: end[frame[name]])  # stable
        last = [end[frame[name]] for name in self.order]
        self._needs = {
            name: sum(at <= end[name] for at in last)
            for name, calls in self._calls.items()
            if calls == 1 and self._holds(name)
        }

        share = sum(_num_inputs(batch) for batch in self._batches) / _num_inputs(example_inputs)
        self.num_bytes = int(share * max((sizes[name] for name in self._needs), default=0))

    def _holds(self, name: str) -> bool:
        """Whether a module has one of the weights, or is a block in a row of blocks."""
        if any(f"{tensor}.".startswith(f"{name}.") for tensor in self.order):
            return True
        parent = self._model.get_submodule(name.rpartition(".")[0])
        row = isinstance(parent, nn.ModuleList | nn.Sequential)
        return row and any(True for _ in self._model.get_submodule(name).children())

    def run(self, tensor: str) -> Iterator[list[Product]]:
        """Runs all batches up to a weight; those that run before it are final.

        Yields:
            The products of this weight, batch by batch.
        """
        found: list[Product] = []
        products = Products(
            {tensor: self._watched[tensor]}, found.append, self._refuse, self._num_samples
        )
        number = self.order.index(tensor)
        final = {name for name, needed in self._needs.items() if needed <= number}
        for _ in self._passes(final, self._frame[tensor], products):
            yield list(found)
            found.clear()

    def calls(self, block: str) -> list[Call]:
        """Runs all batches through a block whose weights are all solved, but may change yet."""
        number = self._needs[block]
        final = {
            name
            for name, needed in self._needs.items()
            if needed <= number and not _inside(name, block) and not _inside(block, name)
        }
        for name in [name for name in self._kept if _inside(name, block)]:
            del self._kept[name]
        given: list[tuple[Any, Any]] = []
        results: list[Any] = []

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            given.append(copy_inputs((args, kwargs)))

        def leave(_: nn.Module, __: Any, result: Any) -> None:
            results.append(copy_inputs(result))

        module = self._model.get_submodule(block)
        with ExitStack() as stack:
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
            for _ in self._passes(final, block, nullcontext()):
                pass
        masks = [
            batch.get("attention_mask") if isinstance(batch, Mapping) else None
            for batch in self._batches
        ]
        return [
            Call(args, kwargs, mask, result)
            for (args, kwargs), mask, result in zip(given, masks, results, strict=True)
        ]

    def holds_once(self, block: str) -> bool:
        """Whether a module runs once in a pass, so that it can be run by itself."""
        return block in self._needs

    def _passes(
        self, final: Collection[str], last: str, around: AbstractContextManager[Any]
    ) -> Iterator[int]:
        """Runs the batches until the module ``last`` is left; numbers of batches.

        What ``final`` modules give is kept, or handed out where it was.
        """
        outermost = {
            name
            for name in final
            if not any(_inside(name, other) for other in final if other != name)
        }
        fresh = {name: [] for name in outermost if name not in self._kept}
        with ExitStack() as stack:
            place = [0]
            for name, values in self._kept.items():
                stack.enter_context(_replaced(self._model.get_submodule(name), values, place))
            for name, values in fresh.items():

                def keep(_: nn.Module, __: Any, result: Any, values: list[Any] = values) -> None:
                    values.append(copy_inputs(result))

                module = self._model.get_submodule(name)
                stack.callback(module.register_forward_hook(keep).remove)
            ends = [0]

            def end(*_: Any) -> None:
                ends[0] += 1
                if ends[0] == self._calls[last]:
                    raise _Stop

            module = self._model.get_submodule(last)
            stack.callback(module.register_forward_hook(end).remove)
            for i, batch in enumerate(self._batches):
                place[0], ends[0] = i, 0
                if isinstance(around, Products):
                    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                    around.begin(self._keys[i], mask)
                with around, torch.no_grad(), suppress(_Stop):
                    forward(self._model, batch)
                yield i
        self._keep({name: v for name, v in fresh.items() if len(v) == len(self._batches)})

    def _keep(self, fresh: Mapping[str, list[Any]]) -> None:
        self._kept |= fresh
        for outer in fresh:
            for name in [name for name in self._kept if name != outer and _inside(name, outer)]:
                del self._kept[name]
            for name in self._before.get(outer, ()):  # nobody reads it any more
                self._kept[name] = [_hollow(value) for value in self._kept.get(name, ())]
                if not self._kept[name]:
                    del self._kept[name]


def _inside(name: str, outer: str) -> bool:
    return outer == "" or f"{name}.".startswith(f"{outer}.")


def _num_inputs(batch: Any) -> int:
    """Numbers in the first tensor of a batch."""
    return next((tensor.numel() for tensor in tensors(batch)), 1)


def _hollow(result: Any) -> Any:
    """The shapes of what a module gave, without its numbers."""
    return map_tensors(result, lambda tensor: tensor.new_zeros(()).expand(tensor.shape))


@contextmanager
def _replaced(module: nn.Module, values: list[Any], place: list[int]) -> Iterator[None]:
    """While this lasts a module hands out what it once gave."""
    own = vars(module).get("forward")

    def forward(*_: Any, **__: Any) -> Any:
        return map_tensors(values[place[0]], lambda t: t if 0 in t.stride() else t.clone())

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
