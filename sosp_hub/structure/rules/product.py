"""Sums over an axis of a parameter: the places where activations are read; attention."""

from torch import Tensor

from sosp_hub.structure.axes import (
    UNIT,
    Axis,
    Prod,
    Sum,
    atoms,
    fixed,
    free,
    is_fixed,
    mark,
    pin,
    size_of,
    split,
    unify,
)
from sosp_hub.structure.rules.registry import Operation, broadcast, rule, tensors
from sosp_hub.structure.terms import Terms


def _contract(
    terms: Terms, left: Tensor, one: Axis, right: Tensor, two: Axis, operation: str, dim: int = -2
) -> None:
    """Sums over the last dimension of ``left`` and over ``dim`` of ``right``."""
    unify(one, two, f"{operation} in {terms.where}")
    if not terms.is_parameter(right):
        terms.read(left, one, -1)
    terms.read(
        right, two, dim if right.dim() > 1 else -1
    )  # alone where both are parameters: a gate acts once
    if not terms.is_parameter(left) and not terms.is_parameter(right):
        mark(one, "contracted")


@rule("mm", "addmm")
def _mm(terms: Terms, op: Operation) -> None:
    left, right = op.args[-2:]
    (rows, inner), (other, columns) = terms.of(left), terms.of(right)
    _contract(terms, left, inner, right, other, "a matrix product")
    result = [rows, columns]
    if op.name == "addmm":
        broadcast(terms, [tuple(result), terms.of(op.tensor)], op.name)
    terms.multiply(rows, inner, columns)
    terms.set(op.out, result)


@rule("bmm", "baddbmm")
def _bmm(terms: Terms, op: Operation) -> None:
    left, right = op.args[-2:]
    (batch, rows, inner), (batch_too, other, columns) = terms.of(left), terms.of(right)
    unify(batch, batch_too, f"a batched product in {terms.where}")
    _contract(terms, left, inner, right, other, "a batched product")
    if not terms.is_parameter(left) and not terms.is_parameter(right):
        mark(batch, "head")  # blocks of a weight are experts only where a router picks them
    result = [batch, rows, columns]
    if op.name == "baddbmm":
        broadcast(terms, [tuple(result), terms.of(op.tensor)], op.name)
    terms.multiply(batch, rows, inner, columns)
    terms.set(op.out, result)


@rule("mv", "dot", "addmv")
def _mv(terms: Terms, op: Operation) -> None:
    left, right = op.args[-2:]
    _contract(terms, left, terms.of(left)[-1], right, terms.of(right)[0], "a matrix product")
    terms.multiply(*terms.of(left))
    result = terms.of(left)[:-1]
    if op.name == "addmv":
        broadcast(terms, [result, terms.of(op.tensor)], op.name)
    terms.set(op.out, result)


@rule("linear")
def _linear(terms: Terms, op: Operation) -> None:
    left, right = op.args[:2]
    *lead, inner = terms.of(left)
    columns, other = terms.of(right)
    _contract(terms, left, inner, right, other, "a linear layer")
    for bias in tensors(op.args[2:]):
        unify(columns, terms.of(bias)[0], f"a bias in {terms.where}")
    terms.multiply(*lead, inner, columns)
    terms.set(op.out, [*lead, columns])


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def _convolution(terms: Terms, op: Operation) -> None:
    tensor, weight, bias = op.args[:3]
    transposed, groups = bool(op.args[6]), int(op.args[8])
    batch, channels, *window_in = terms.of(tensor)
    first, second, *window = terms.of(weight)
    where = f"a convolution in {terms.where}"
    halves_in, halves_out = split(channels, groups, where), split(first, groups, where)
    if halves_in is None or halves_out is None:
        raise ValueError("groups do not divide the channels")
    (groups_in, inner), (groups_out, per_group) = halves_in, halves_out
    unify(groups_in, groups_out, where)
    if transposed:
        _contract(terms, tensor, inner, weight, per_group, where)
        result: Axis = Prod((groups_out, second))
    else:
        _contract(terms, tensor, inner, weight, second, where)
        result = first
    if bias is not None:
        unify(result, terms.of(bias)[0], where)
    mark(Sum((channels, result)), "convolved")
    for axis in window:
        terms.fix(axis, "the window of a convolution")
    spatial = [
        axis if by_itself else terms.spatial(axis, int(size), "a window slides along it")
        for axis, size, by_itself in zip(window_in, op.out.shape[2:], _one_by_one(op), strict=True)
    ]
    places = window_in if transposed else spatial
    terms.multiply(batch, groups_out, per_group, second, *places, *window)
    terms.set(op.out, [batch, result, *spatial])


@rule("deform_conv2d")
def _deformed(terms: Terms, op: Operation) -> None:
    """A convolution whose window reads from places that are given for each element."""
    tensor, weight, shifts, factors, bias = op.args[:5]
    groups, shift_groups = op.args[11:13]
    if groups != 1 or shift_groups != 1:
        raise ValueError("groups of channels")
    batch, channels, *spatial = terms.of(tensor)
    first, second, *window = terms.of(weight)
    where = f"a convolution in {terms.where}"
    _contract(terms, tensor, channels, weight, second, where)
    unify(first, terms.of(bias)[0], where)
    mark(Sum((channels, first)), "convolved")
    given = [axis for each in (shifts, factors) for axis in terms.of(each)[1:]]
    for axis in (*window, *spatial, *given):
        terms.fix(axis, "the window of a convolution")
    places = [
        fixed(int(size), f"a window slides along it in {terms.where}") for size in op.out.shape[2:]
    ]
    terms.multiply(batch, first, second, *places, *window)
    terms.set(op.out, [batch, first, *places])


@rule("_trilinear")
def _bilinear(terms: Terms, op: Operation) -> None:
    """A weight (results, left, right) times two activations, summed over both."""
    left, weight, right = op.args[:3]
    if weight.dim() != 3 or list(op.args[6]) != [2, 3]:
        raise ValueError("only the products of `bilinear` are known")
    (rows, inner), (rows_too, other) = terms.of(left), terms.of(right)
    results, first, second = terms.of(weight)
    where = f"a bilinear layer in {terms.where}"
    unify(rows, rows_too, where)
    _contract(terms, left, inner, weight, first, where, 1)
    _contract(terms, right, other, weight, second, where, 2)
    terms.multiply(rows, results, inner, other)
    terms.set(op.out, [rows, results])


def _one_by_one(op: Operation) -> list[bool]:
    """For each spatial dimension whether each place is computed from that place alone."""
    window = op.args[1].shape[2:]
    strides, paddings, more = (
        list(sizes) * (len(window) if len(sizes) == 1 else 1)
        for sizes in (op.args[3], op.args[4], op.args[7])
    )
    return [
        (size, stride, padding, added) == (1, 1, 0, 0)
        for size, stride, padding, added in zip(window, strides, paddings, more, strict=True)
    ]


def attention(
    terms: Terms,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    scaled: bool,
    causal: bool,
) -> None:
    """``scaled_dot_product_attention`` of (..., heads, length, width), KV heads shared or not."""
    *lead_q, length, width = terms.of(query)
    *lead_k, places, width_k = terms.of(key)
    *lead_v, places_v, width_v = terms.of(value)
    operation = f"attention in {terms.where}"
    unify(width, width_k, operation)
    unify(places, places_v, operation)
    mark(width, "contracted")
    if not scaled:
        terms.mix(width, "attention is scaled by 1/sqrt(its size)")
        terms.scales.append((terms.modules[-1], width))
    for one, two in zip(lead_k, lead_v, strict=True):
        unify(one, two, operation)
    for i, (one, two) in enumerate(zip(lead_q, lead_k, strict=True)):
        if size_of(one) != size_of(two) and i == len(lead_q) - 1:
            copies = free(size_of(one) // size_of(two))
            mark(copies, "copies")
            unify(one, Prod((two, copies)), operation)
        elif size_of(one) == size_of(two):
            unify(one, two, operation)
    mark(lead_q[-1] if lead_q else UNIT, "head")
    if causal:
        pin(Sum((length, places)), operation)
    elif not is_fixed(places):  # channels that take the place of tokens
        terms.mix(places, "attention runs over it")
    if mask is not None:
        broadcast(terms, [(*lead_q, length, places), terms.of(mask)], operation)
    terms.multiply(*lead_q, length, width, places)
    terms.multiply(*lead_q, length, places, width_v)
    terms.set(out, [*lead_q, length, width_v])


@rule("_euclidean_dist", "_cdist_forward")
def _distances(terms: Terms, op: Operation) -> None:
    left, right = op.args[:2]
    *lead_left, rows, inner = terms.of(left)
    *lead_right, columns, other = terms.of(right)
    _contract(terms, left, inner, right, other, "distances", -1)
    terms.mix(inner, "a distance runs over it")
    lead = broadcast(terms, [tuple(lead_left), tuple(lead_right)], op.name)
    terms.multiply(*lead, rows, inner, columns)
    terms.set(op.out, [*lead, rows, columns])


@rule("mkldnn_rnn_layer")
def _recurrent(terms: Terms, op: Operation) -> None:
    """An LSTM in one direction: gates, each of all units, from the input and from the state."""
    tensor, by_input, by_state, *biases, state, cell = op.args[:7]
    out, last_state, last_cell, *scratch = op.out
    what = f"a recurrent layer in {terms.where}"
    *lead, width = terms.of(tensor)
    units = terms.of(state)[-1]
    _contract(terms, tensor, width, by_input, terms.of(by_input)[1], what, -1)
    _contract(terms, state, units, by_state, terms.of(by_state)[1], what, -1)
    unify(units, terms.of(cell)[-1], what)
    for weight in (by_input, by_state, *biases):
        whole = terms.of(weight)[0]
        halves = split(whole, size_of(whole) // size_of(units), what)
        assert halves is not None
        terms.fix(halves[0], "the gates of a recurrent layer")
        unify(halves[1], units, what)
    terms.multiply(*lead, terms.of(by_input)[0], width)
    terms.multiply(*lead, terms.of(by_state)[0], units)
    terms.set(out, [*lead, units])
    terms.set(last_state, terms.of(state))
    terms.set(last_cell, terms.of(cell))
    for each in tensors(scratch):
        terms.set(each, [fixed(int(size), what) for size in each.shape])


@rule("_grouped_mm", "grouped_mm_fallback")
def _grouped_mm(terms: Terms, op: Operation) -> None:
    left, right = op.args[:2]
    if left.dim() != 2 or right.dim() != 3:
        raise ValueError("only rows by experts are known")
    rows, inner = terms.of(left)
    experts, other, columns = terms.of(right)
    _contract(terms, left, inner, right, other, "a product by experts")
    unify(experts, terms.of(op.argument(2, "offs"))[0], f"a product by experts in {terms.where}")
    mark(experts, "expert")
    items = 16 // left.element_size()  # its kernel wants rows of whole 16 bytes
    for axis in (inner, columns):
        for atom in atoms(axis):
            atom.multiple = max(atom.multiple, items)
    terms.multiply(rows, inner, columns)
    terms.set(op.out, [rows, columns])
