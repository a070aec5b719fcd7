"""What a running trace knows: axes of every tensor, reads of parameters, demands on sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sosp_hub.compat.torch import TensorTable
from sosp_hub.structure.axes import UNIT, Atom, Axis, Prod, Sum, fixed, flag, pin, size_of
from sosp_hub.structure.traced_int import Expr, Op, TracedInt

Axes = tuple[Axis, ...]

AS_OUTPUT = "an output of the model has this size"
"""Why an axis is pinned that a caller may not need whole."""


@dataclass(frozen=True)
class Step:
    """One operation: its tensors' axes, and what a cut means to it.

    Attributes:
        mixes: It combines values along a cuttable axis other than by a weighted sum.
        picked: Its whole numbers are positions along this axis.
        counts: Its result counts what lies before a position, also where a structure is gone.
        draws: It draws random numbers, as many as there are elements.
    """

    name: str
    module: str
    inputs: tuple[Axes, ...]
    outputs: tuple[Axes, ...]
    mixes: bool
    floats: tuple[float, ...] = ()
    picked: Axis | None = None
    counts: bool = False
    draws: bool = False


@dataclass(frozen=True)
class Read:
    """A sum over an axis of a parameter, in a module's code: an activation is used here."""

    tensor: str
    axis: Axis
    module: str
    stride: int


@dataclass(frozen=True)
class Constraint:
    """``expr`` must equal the size of ``axis`` in any cut model."""

    expr: Expr
    axis: Axis
    where: str


@dataclass
class Terms:
    """State of one trace. Rules read axes with ``of`` and write them with ``set``."""

    axes: TensorTable = field(default_factory=TensorTable)
    source: TensorTable = field(default_factory=TensorTable)
    numbers: TensorTable = field(default_factory=TensorTable)
    tallies: TensorTable = field(default_factory=TensorTable)
    counted: TensorTable = field(default_factory=TensorTable)
    unused: TensorTable = field(default_factory=TensorTable)
    reads: list[Read] = field(default_factory=list)
    macs: list[tuple[str, Axes]] = field(default_factory=list)
    constraints: list[Constraint] = field(default_factory=list)
    comparisons: list[Constraint] = field(default_factory=list)
    given: dict[str | int, list[Axis]] = field(default_factory=dict)
    leaks: list[tuple[Expr, str]] = field(default_factory=list)
    plain: dict[tuple[str, int], Expr] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    modules: list[str] = field(default_factory=lambda: [""])
    results: TensorTable = field(default_factory=TensorTable)
    uses: dict[tuple[str, int], dict[str, None]] = field(default_factory=dict)
    beside: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    refilled: set[str] = field(default_factory=set)
    touched: set[str] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    only_in_training: tuple[str, ...] = ()
    never_used: tuple[str, ...] = ()
    normalised: set[str] = field(default_factory=set)
    scales: list[tuple[str, Axis]] = field(default_factory=list)
    mixes: bool = False
    picked: Axis | None = None
    counts: bool = False
    draws: bool = False

    def begin(self) -> None:
        """Another operation starts."""
        self.mixes, self.picked, self.counts, self.draws = False, None, False, False

    @property
    def where(self) -> str:
        """Name of the module whose code runs, for reasons."""
        return self.modules[-1] or "the model"

    def of(self, tensor: Tensor) -> Axes:
        """Axes of a tensor; one that the trace has not seen is a constant and stays as it is."""
        known = self.axes.get(tensor)
        if known is None or len(known) != tensor.dim():
            reason = f"a constant tensor in {self.where} has this size"
            known = tuple(fixed(size, reason) for size in tensor.shape)
            self.axes[tensor] = known
        return known

    def was(self, tensor: Tensor) -> Axes:
        """Axes of a tensor before the operation that runs, which may have changed its own shape."""
        return self.axes.get(tensor) or self.of(tensor)

    def set(self, tensor: Any, axes: Sequence[Axis]) -> None:
        """Gives an operation's output its axes."""
        if not isinstance(tensor, Tensor):
            return
        sizes, expected = [size_of(axis) for axis in axes], list(tensor.shape)
        if sizes != expected:
            raise AssertionError(
                f"a rule gave axes of sizes {sizes} to a tensor of shape {expected}"
            )
        self.axes[tensor] = (*axes,)  # a tuple of its own: by it a tensor is followed

    def read(self, operand: Tensor, axis: Axis, dim: int) -> None:
        """Remembers that a parameter, or a view of one, is summed over along ``axis``."""
        name = self.source.get(operand)
        if name is not None:
            self.reads.append(Read(name, axis, self.modules[-1], operand.stride(dim)))

    def use(self, tensor: Tensor, *, values: bool = True) -> None:
        """Remembers that the running module's code computes with a tensor, or with its sizes."""
        if (name := self.source.get(tensor)) is not None:
            self.touched.add(name)
        if values and (picked := self.unused.get(tensor)) is not None:
            pin(*picked)
        for result in self.results.get(tensor) or ():
            self.uses.setdefault(result, {}).setdefault(self.modules[-1])

    def is_parameter(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or a mere rearrangement of one."""
        return self.source.get(tensor) is not None

    def mix(self, axis: Axis, reason: str) -> None:
        """Values along this axis are combined other than by a weighted sum."""
        self.mixes = True
        flag(axis, f"{reason} in {self.where}")

    def fix(self, axis: Axis, operation: str) -> None:
        """Pins an axis, with the operation and its place as the reason."""
        pin(axis, f"{operation} in {self.where}")

    def fix_if_used(self, tensor: Tensor, axis: Axis, operation: str) -> None:
        """Pins an axis once the code computes with a tensor, not where it asks for its sizes."""
        self.unused[tensor] = axis, f"{operation} in {self.where}"

    def multiply(self, *axes: Axis) -> None:
        """Notes the cost of a product: the sizes of these axes, multiplied."""
        self.macs.append((self.modules[-1], axes))

    def spatial(self, axis: Axis, size: int, operation: str) -> Axis:
        """The axis that sliding or resampling along ``axis`` makes."""
        self.fix(axis, operation)
        return fixed(size, f"{operation} in {self.where}")

    def leak(self, expr: Expr) -> None:
        """The code turned a size into another number."""
        self.leaks.append((expr, self.where))

    def lose(self, value: int, expr: Expr, leaked: Sequence[Expr]) -> None:
        """The code of a module made a plain number of a size, which this value may be later."""
        self.forgive(leaked)
        self.plain[self.modules[-1], value] = expr

    def forgive(self, leaked: Sequence[Expr]) -> None:
        """These very sizes were not used as values after all."""
        self.leaks = [leak for leak in self.leaks if not any(leak[0] is each for each in leaked)]

    def compare(self, one: Expr, two: Expr) -> None:
        """The code relies on two sizes being equal."""
        where = f"a comparison in {self.where}"
        for expr, axis in ((one, two), (two, one)):
            if isinstance(axis, Atom | Prod | Sum):
                self.constraints.append(Constraint(expr, axis, where))
                return
        self.hold(Op("==", one, two))

    def take(self, number: int, axis: Axis) -> None:
        """The code picks so many positions of this axis at once."""
        self.hold(Op(">=", axis, number), f"whether {number} of them can be picked")

    def hold(self, comparison: Op, operation: str = "a comparison") -> None:
        """Records a comparison that must keep its truth value, since the code branched on it."""
        self.comparisons.append(Constraint(comparison, UNIT, f"{operation} in {self.where}"))

    def origin(self, value: Any) -> Any:
        """A number of the running code as the size that was lost in it, if one was."""
        expr = self.plain.get((self.modules[-1], value)) if type(value) is int else None
        return value if expr is None else TracedInt(value, expr)

    def constrain(self, value: Any, axis: Axis, operation: str) -> None:
        """A size argument and the axis it describes."""
        value = self.origin(value)
        if isinstance(value, TracedInt):
            self.constraints.append(Constraint(value.expr, axis, f"{operation} in {self.where}"))
        elif isinstance(value, int) and value not in {-1, 1} and axis is not UNIT:
            self.fix(axis, f"the number {value} is written into the code ({operation})")
