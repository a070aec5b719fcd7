"""Gate derivatives against dense Hessians, finite changes and the weights' own Hessian."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import hessian, hvp
from torch.utils.checkpoint import checkpoint

from sosp_hub.derivatives import (
    LowRank,
    Protocol,
    gate_gradient,
    gauss_newton,
    gram,
    hessian_product,
    sample_squares,
)
from sosp_hub.derivatives.divergence import divergence
from sosp_hub.errors import CriterionError
from sosp_hub.tasks import next_token
from tests.compare import assert_close
from tests.gates.toys import TOYS, Tokens, Toy, attention, group, perceptron, residual, stand_in


def protocol(**options):
    return Protocol(**{"loss_fn": F.cross_entropy, **options})  # in float64, as the toys are


@pytest.fixture(params=TOYS)
def toy(request):
    return TOYS[request.param]()


def test_gradient_and_product_equal_the_dense_hessian(toy):
    found = hessian_product(toy.model, toy.groups, [toy.batch], protocol())
    assert_close(found.gradient, toy.split(toy.gradient()), relative=1e-10)
    assert_close(found.second, toy.split(toy.hessian().sum(1)), relative=1e-9)
    assert_close(found.loss, toy.loss(toy.ones()), relative=1e-7)
    assert_close(
        gate_gradient(toy.model, toy.groups, [toy.batch], protocol()).gradient, found.gradient
    )


def test_gates_with_which_the_outputs_are_no_numbers_are_far_from_the_dense_model(toy):
    found = [
        divergence(toy.model, toy.groups, [toy.batch], toy.split(toy.ones() * gate), protocol())
        for gate in (1.0, 0.5, float("inf"))
    ]
    assert found[0] < 1e-12 < found[1] < 1e9 < found[2]


def test_product_with_any_vector(toy):
    vector = torch.randn(toy.num_structures, dtype=torch.float64)
    found = hessian_product(
        toy.model, toy.groups, [toy.batch], protocol(), vector=toy.split(vector)
    )
    assert_close(found.second, toy.split(toy.hessian() @ vector), relative=1e-9)


def test_differences_are_near_the_exact_product(toy):
    exact = hessian_product(toy.model, toy.groups, [toy.batch], protocol())
    near = hessian_product(
        toy.model, toy.groups, [toy.batch], protocol(), mode="differences", eps=1e-3
    )
    assert_close(near.second, exact.second, relative=1e-4)
    assert_close(near.gradient, exact.gradient, relative=1e-4)


def test_sums_are_derivatives_along_the_ones(toy):
    found = hessian_product(toy.model, toy.groups, [toy.batch], protocol())

    def along(t):
        return toy.loss(t * toy.ones())

    one = torch.tensor(1.0, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(along, one)
    assert_close(sum(g.sum() for g in found.gradient.values()), slope, relative=1e-10)
    assert_close(sum(r.sum() for r in found.second.values()), hessian(along, one), relative=1e-9)


def test_removing_everything_from_a_quadratic_loss():
    toy = perceptron()
    only = {"b": toy.groups["b"]}  # the last layer is linear, so a squared error is quadratic in b

    def squared(logits, labels):
        return (logits - F.one_hot(labels, 3)).square().mean()

    found = hessian_product(toy.model, only, [toy.batch], protocol(loss_fn=squared))
    removed = toy.model(toy.batch[0], {"b": torch.zeros(3, dtype=torch.float64)})
    change = squared(removed, toy.batch[1]) - squared(toy.model(toy.batch[0]), toy.batch[1])
    assert_close(-found.gradient["b"].sum() + 0.5 * found.second["b"].sum(), change, relative=1e-10)


@pytest.mark.parametrize("make", [perceptron, residual], ids=["perceptron", "residual"])
def test_weight_gates_equal_the_weights_own_hessian(make):
    toy = make()
    filters = [
        member.tensor
        for group in toy.groups.values()
        for member in group.members
        if not member.reads and "bn" not in member.tensor and "bias" not in member.tensor
    ]
    weights = {name: toy.model.get_parameter(name).detach() for name in filters}

    def loss(*values):
        swapped = dict(zip(weights, values, strict=True))
        return F.cross_entropy(
            torch.func.functional_call(toy.model, swapped, (toy.batch[0],)), toy.batch[1]
        )

    values = tuple(weights.values())
    gradient = torch.autograd.functional.jacobian(loss, values)
    product = hvp(loss, values, values)[1]

    def of(group_, parts):
        own = [member.tensor for member in group_.members if not member.reads]
        return sum(
            (weights[name] * part).flatten(1).sum(1)
            for name, part in zip(weights, parts, strict=True)
            if name in own
        )

    found = hessian_product(toy.model, toy.groups, [toy.batch], protocol(gate="weight"))
    expected = {name: of(group, gradient) for name, group in toy.groups.items()}
    assert_close(found.gradient, expected, relative=1e-10)
    expected = {name: of(group, product) for name, group in toy.groups.items()}
    assert_close(found.second, expected, relative=1e-9)


def test_sample_squares_equal_one_sample_at_a_time():
    toy = TOYS["residual"]()
    inputs, labels = toy.batch
    singles = [
        gate_gradient(
            toy.model, toy.groups, [(inputs[i : i + 1], labels[i : i + 1])], protocol()
        ).gradient
        for i in range(len(labels))
    ]
    found = sample_squares(
        toy.model, toy.groups, [(inputs[:3], labels[:3]), (inputs[3:], labels[3:])], protocol()
    )
    for name in toy.groups:
        rows = torch.stack([single[name] for single in singles])
        assert_close(found.gradient[name], rows.mean(0), relative=1e-10)
        assert_close(found.second[name], rows.square().mean(0), relative=1e-10)


@pytest.mark.parametrize("flat", [False, True])
def test_token_squares_equal_what_each_token_gives_to_the_gradient(flat):
    torch.manual_seed(0)
    model, ids = Tokens(flat).double(), torch.randint(7, (4, 3))
    groups = {"a": group("a", "neuron", 5, [("down", -1, None)])}

    def loss_fn(outputs, labels):
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="sum")

    rows = []
    for sample in ids.split(1):  # by hand: what a token's structure is, times the slope there
        read = []
        handle = model.down.register_forward_pre_hook(lambda _, args, to=read: to.append(args[0]))
        loss = loss_fn(model(sample), sample)
        handle.remove()
        (slope,) = torch.autograd.grad(loss, read)
        rows.append((read[0] * slope).view(3, 5).detach())
    shares = torch.stack(rows)
    given = protocol(loss_fn=lambda *pair: loss_fn(*pair) / len(pair[1]))
    batches = [(ids[:3], ids[:3]), (ids[3:], ids[3:])]
    found = sample_squares(model, groups, batches, given, per_token=True)
    assert_close(found.gradient["a"], shares.sum(1).mean(0), relative=1e-10)
    assert_close(found.second["a"], shares.square().sum(1).mean(0), relative=1e-10)
    whole = sample_squares(model, groups, batches, given)
    assert_close(whole.second["a"], shares.sum(1).square().mean(0), relative=1e-10)


def test_token_squares_need_tokens():
    toy = perceptron()
    with pytest.raises(CriterionError, match=r"per_token: needs batches of token ids"):
        sample_squares(toy.model, toy.groups, [toy.batch], protocol(), per_token=True)
    model, ids = Tokens(False).double(), torch.randint(7, (4, 3))
    elsewhere = {"a": group("a", "neuron", 4, [("up", 0, None)])}
    with pytest.raises(CriterionError, match=r"4 samples of 3 tokens .* leave out per_token"):
        sample_squares(model, elsewhere, [(ids, ids[:, 0])], protocol(), per_token=True)
    model, chosen = Tokens(True), {"a": group("a", "neuron", 5, [("down", -1, None)])}
    model.down.register_forward_pre_hook(lambda _, args: args[0][::2], prepend=True)
    with pytest.raises(CriterionError, match=r"4 samples of 3 tokens .* leave out per_token"):
        sample_squares(model, chosen, [(ids, ids)], protocol(), per_token=True)


def test_batches_count_by_their_samples(toy):
    inputs, labels = toy.batch
    whole = hessian_product(toy.model, toy.groups, [toy.batch], protocol())
    uneven = [(inputs[:1], labels[:1]), (inputs[1:], labels[1:])]
    assert_close(hessian_product(toy.model, toy.groups, uneven, protocol()).second, whole.second)
    small = protocol(micro_batch_size=3)
    micro = hessian_product(toy.model, toy.groups, [toy.batch], small)
    assert_close(micro.second, whole.second)
    assert (micro.weight, micro.num_samples) == (len(labels), len(labels))


def test_processes_exchange_sums_once():
    toy = perceptron()
    inputs, labels = toy.batch
    whole = hessian_product(toy.model, toy.groups, [toy.batch], protocol())
    sent = []
    shares = [[(inputs[:2], labels[:2])], [(inputs[2:], labels[2:])], []]
    for share in shares:  # each process alone, to see what it sends

        def keep(flat):
            sent.append(flat)
            return whole_flat if len(sent) > len(shares) else flat

        try:
            hessian_product(toy.model, toy.groups, share, protocol(process_sum=keep))
        except CriterionError:
            assert not share  # the process without data has nothing to divide by
    assert [len(flat) for flat in sent] == [4 + 2 + 2 * toy.num_structures] * len(shares)
    whole_flat = sum(sent)
    found = hessian_product(toy.model, toy.groups, shares[0], protocol(process_sum=keep))
    assert_close(found.second, whole.second)


def caused_by(cause):
    """What code that wraps the errors of its layers raises."""
    error = RuntimeError("layer 3 went wrong")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("could not create a primitive"),
        caused_by(torch.OutOfMemoryError("no memory")),
    ],
    ids=["gpu", "cpu", "onednn", "told by a layer"],
)
def test_out_of_memory_halves_the_batch(monkeypatch, caplog, error):
    toy = perceptron(num_samples=7)
    whole = hessian_product(toy.model, toy.groups, [toy.batch], protocol())
    forward = toy.model.forward

    def small_memory(x, gates=None):
        if len(x) > 2:
            raise error
        return forward(x, gates)

    monkeypatch.setattr(toy.model, "forward", small_memory)
    with caplog.at_level("INFO"):
        found = hessian_product(toy.model, toy.groups, [toy.batch], protocol(), mode="auto")
    assert_close(found.second, whole.second)
    assert "micro-batches of 2" in caplog.text


def test_auto_takes_differences_where_one_sample_is_too_much(monkeypatch, caplog):
    """Of the exact product, which takes the most memory; smaller micro-batches are tried first."""
    toy = perceptron(num_samples=4)
    expected = hessian_product(
        toy.model, toy.groups, [toy.batch], protocol(), mode="differences", eps=1e-3
    )
    tried = []

    def small_memory(model, gates, batch, *_):
        tried.append(len(batch[1]))
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("sosp_hub.derivatives.hessian._add_exact", small_memory)
    options = {"mode": "auto", "eps": 1e-3}
    with caplog.at_level("INFO"):
        found = hessian_product(toy.model, toy.groups, [toy.batch], protocol(), **options)
    assert_close(found.second, expected.second, relative=1e-9)
    assert tried == [4, 2, 1]
    assert caplog.text.count("differences instead of exact second derivatives: no memory") == 1
    with pytest.raises(torch.OutOfMemoryError):
        hessian_product(toy.model, toy.groups, [toy.batch], protocol(), mode="exact")


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


def test_auto_takes_differences_where_a_kernel_has_no_second_derivative(caplog):
    toy = perceptron()
    toy.model.b.register_forward_hook(lambda module, args, output: _OnceOnly.apply(output))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        hessian_product(toy.model, toy.groups, [toy.batch], protocol(), mode="exact")
    with caplog.at_level("INFO"):
        hessian_product(toy.model, toy.groups, [toy.batch], protocol(), mode="auto")
    assert "differences instead of exact" in caplog.text


def test_auto_takes_differences_where_layers_are_computed_again(caplog):
    """As timm's models do with set_grad_checkpointing, also in eval mode."""

    toy = perceptron()
    inner = toy.model.b.forward
    toy.model.b.forward = lambda x: checkpoint(
        lambda x: torch.relu(inner(x)), x, use_reentrant=False
    )
    call = {"groups": toy.groups, "batches": [toy.batch], "protocol": protocol()}
    expected = hessian_product(toy.model, **call, mode="differences")
    with pytest.raises(CriterionError, match=r"checkpoint.*or write mode='differences'"):
        hessian_product(toy.model, **call, mode="exact")
    with caplog.at_level("INFO"):
        found = hessian_product(toy.model, **call, mode="auto")
    assert_close(found.second, expected.second, relative=0)
    assert "differences instead of exact" in caplog.text


@pytest.mark.parametrize("mode", ["exact", "differences"])
def test_faults_of_the_data(mode):
    toy = perceptron()
    inputs, labels = toy.batch
    for batches, words in (([], "no calibration data"), ([(inputs * torch.nan, labels)], "finite")):
        with pytest.raises(CriterionError, match=words):
            hessian_product(toy.model, toy.groups, batches, protocol(), mode=mode)


@pytest.mark.parametrize("mode", ["exact", "differences"])
def test_gates_without_effect_are_named(mode):
    toy = perceptron()
    toy.model.c.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(CriterionError, match="does not depend on the gates of 'a', 'b'"):
        hessian_product(toy.model, toy.groups, [toy.batch], protocol(), mode=mode)


def test_a_step_that_rounds_away_is_refused():
    toy = perceptron()
    toy.model.bfloat16()
    with pytest.raises(CriterionError, match=r"eps=0\.00195312 .* 0\.03125"):
        hessian_product(
            toy.model, toy.groups, [toy.batch], protocol(), mode="differences", eps=2**-9
        )


class _Int8Product(torch.autograd.Function):
    """A kernel of quantised weights: one derivative by the activations, and no second."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return x @ (weight.to(x) * scale).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        return grad @ (weight.to(grad) * scale), None, None


class _Int8Linear(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return _Int8Product.apply(x, self.weight, self.scale)


def test_quantised_weights_are_scored_by_differences(caplog):
    plain = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.GELU(), torch.nn.Linear(5, 3))
    coarse = torch.nn.Sequential(_Int8Linear(plain[0]), torch.nn.GELU(), _Int8Linear(plain[2]))
    with torch.no_grad():
        for one, other in ((plain[0], coarse[0]), (plain[2], coarse[2])):
            one.weight.copy_(other.weight * other.scale)
            one.bias.zero_()
    groups = {"n": group("n", "neuron", 5, [("2", -1, None)])}
    batches = [(torch.randn(20, 4), torch.arange(20) % 3)]
    expected = hessian_product(plain, groups, batches, protocol())
    with caplog.at_level("INFO"):
        found = hessian_product(coarse, groups, batches, protocol(), mode="auto")
    assert "differences instead of exact" in caplog.text
    assert_close(found.gradient, expected.gradient, relative=1e-3)
    assert_close(found.second, expected.second, relative=1e-2)


def test_the_default_step_is_as_coarse_as_the_weights():
    """Kernels of whole numbers round what comes in, so that a small step would be lost."""
    plain = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.GELU(), torch.nn.Linear(5, 3))
    coarse = torch.nn.Sequential(plain[0], plain[1], _Int8Linear(plain[2]))
    half = copy.deepcopy(plain).bfloat16()
    groups = {"n": group("n", "neuron", 5, [("2", -1, None)])}
    batches = [(torch.randn(20, 4), torch.arange(20) % 3)]
    for model, eps in ((plain, 2**-7), (coarse, 2**-4), (half, 2**-4)):
        found, expected = (
            hessian_product(model, groups, batches, protocol(), mode="differences", eps=step).second
            for step in (None, eps)
        )
        assert_close(found, expected, relative=0)


def test_batch_of_one():
    toy = perceptron(num_samples=1)
    assert hessian_product(toy.model, toy.groups, [toy.batch], protocol()).num_samples == 1


def test_samples_of_a_language_model_are_sequences_and_its_mean_is_over_tokens():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 5))
    model.double()
    groups = {"n": group("n", "neuron", 4, [("2", -1, None)])}
    inputs = torch.randn(3, 6, 3, dtype=torch.float64)
    labels = torch.randint(5, (3, 6))
    labels[0, 3:] = -100

    def mean(logits, labels):
        value = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return value, int((labels[:, 1:] != -100).sum())

    def total(gate, n):
        logits = model[2](model[1](model[0](inputs[n])) * gate)
        return F.cross_entropy(logits[:-1], labels[n, 1:], reduction="sum")

    ones = torch.ones(4, dtype=torch.float64)
    rows = [torch.autograd.functional.jacobian(lambda g, n=n: total(g, n), ones) for n in range(3)]
    rows = torch.stack(rows)
    found = sample_squares(model, groups, [(inputs, labels)], protocol(loss_fn=mean))
    assert (found.weight, found.num_samples) == (12, 3)
    assert_close(found.gradient["n"], rows.sum(0) / 12, relative=1e-10)
    assert_close(found.second["n"], rows.square().mean(0), relative=1e-10)


def _explicit_gauss_newton(toy, curvature, at=None):
    total, at = 0, toy.ones() if at is None else at
    for n in range(len(toy.batch[1])):
        one = Toy(toy.model, toy.graph, tuple(part[n : n + 1] for part in toy.batch))
        jacobian = torch.autograd.functional.jacobian(lambda m, one=one: one.logits(m)[0], at)
        total = total + jacobian.T @ curvature(one.logits(at)[0].softmax(-1)) @ jacobian
    return total / len(toy.batch[1])


def _softmax_curvature(share):
    return torch.diag(share) - share[:, None] * share


@pytest.mark.parametrize("make", TOYS.values(), ids=TOYS)
def test_gauss_newton_equals_explicit_jacobians(make):
    toy = make()
    if make is attention:  # the gates of its neurons sit on a weight, which samples share
        toy = Toy(toy.model, stand_in(toy.groups["heads"]), toy.batch)
    inputs, labels = toy.batch
    parts = [(inputs[:1], labels[:1]), (inputs[1:], labels[1:])]
    found = gauss_newton(toy.model, toy.groups, parts, protocol())
    assert_close(found.matrix, _explicit_gauss_newton(toy, _softmax_curvature), relative=1e-10)
    assert_close(found.gradient, toy.split(toy.gradient()), relative=1e-10)
    assert found.exact
    squared = gauss_newton(toy.model, toy.groups, parts, protocol(), loss="squared")
    expected = _explicit_gauss_newton(toy, lambda share: torch.eye(3, dtype=torch.float64))
    assert_close(squared.matrix, expected, relative=1e-10)
    summed = gauss_newton(toy.model, toy.groups, parts, protocol(), max_classes=3)  # its outputs
    assert_close(summed.matrix, found.matrix, relative=1e-10)
    ones = toy.ones()
    at = torch.rand(len(ones), dtype=ones.dtype, generator=torch.Generator().manual_seed(0))
    there = gauss_newton(toy.model, toy.groups, parts, protocol(), at=toy.split(at))
    expected = _explicit_gauss_newton(toy, _softmax_curvature, at)
    assert_close(there.matrix, expected, relative=1e-10)


def test_few_rows_are_kept_and_many_are_summed_up(monkeypatch):
    """Whatever is held, it is the same matrix."""
    rows = [torch.randn(2, 8, dtype=torch.float64) for _ in range(3)]
    held, expected = gram.Gram(8), torch.zeros(8, 8, dtype=torch.float64)
    for number, row in enumerate(rows):
        held.add(row)
        expected += row.T @ row
        found = copy.deepcopy(held).mean(5, None, None)
        assert isinstance(found, LowRank) == (number < 2)
        assert_close(found.dense() if number < 2 else found, expected / 5, relative=1e-12)
    monkeypatch.setattr(gram, "MOST_NUMBERS", 8 * 8 - 1)
    held = gram.Gram(8)
    for row in rows:
        held.add(row)
    found = held.mean(5, None, None)  # too many structures for a matrix
    assert_close(found.dense(), expected / 5, relative=1e-12)
    with pytest.raises(CriterionError, match=r"8 structures times 8 rows .* fewer samples"):
        held.add(rows[0])


def test_few_rows_of_several_processes_are_put_together():
    ours, theirs = torch.randn(2, 2, 16, dtype=torch.float64)
    both = torch.cat([ours, theirs])
    held = gram.Gram(16, alone=False)
    held.add(ours)
    found = held.mean(3, lambda num: num + 2, lambda mine: torch.cat([mine, theirs]))
    assert_close(found.dense(), both.T @ both / 3, relative=1e-12)
    whole = held.mean(3, lambda mine: mine + (2 if mine.ndim == 0 else theirs.T @ theirs), None)
    assert_close(whole, both.T @ both / 3, relative=1e-12)


def test_drawn_labels_give_the_gauss_newton_matrix_in_the_mean():
    toy = perceptron()
    options = {"max_classes": 2, "seed": 1}
    near = gauss_newton(toy.model, toy.groups, [toy.batch], protocol(), num_draws=3000, **options)
    assert not near.exact
    expected = _explicit_gauss_newton(toy, _softmax_curvature)
    assert_close(near.matrix, expected, relative=0.05)
    again = gauss_newton(toy.model, toy.groups, [toy.batch], protocol(), num_draws=3, **options)
    same = gauss_newton(toy.model, toy.groups, [toy.batch], protocol(), num_draws=3, **options)
    assert_close(again.matrix, same.matrix, relative=0)


@pytest.mark.parametrize("num_draws", [1, 3])
def test_drawn_labels_are_the_samples_own(num_draws):
    """However samples come in batches, and in whichever process."""
    toy = perceptron()
    inputs, labels = toy.batch
    options = {"max_classes": 2, "seed": 5, "num_draws": num_draws}
    whole = gauss_newton(toy.model, toy.groups, [toy.batch], protocol(), **options).matrix
    order = torch.tensor([4, 0, 6, 5, 2, 3, 1])
    parts = [(inputs[part], labels[part]) for part in order.split([1, 4, 2])]
    found = gauss_newton(toy.model, toy.groups, parts, protocol(micro_batch_size=3), **options)
    assert_close(found.matrix, whole, relative=1e-12)
    other = gauss_newton(toy.model, toy.groups, parts, protocol(), **{**options, "seed": 6})
    assert (other.matrix - whole).abs().max() > 0.01 * whole.abs().max()


def test_padding_changes_no_drawn_label():
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3)

        def forward(self, input_ids, attention_mask):
            mask = attention_mask.unsqueeze(-1)
            x = (self.table(input_ids) * mask).sum(1) / mask.sum(1)
            return {"logits": self.out(x)}

    model, short = Mean().double(), torch.tensor([[3, 5, 2], [1, 1, 8]])
    groups = {"n": group("n", "neuron", 4, [("out", -1, None)])}
    labels = torch.tensor([0, 1])
    padded = torch.tensor([[3, 5, 2, 0, 0], [1, 1, 8, 0, 0]])
    found = [
        gauss_newton(
            model,
            groups,
            [{"input_ids": ids, "attention_mask": (ids > 0).double(), "labels": labels}],
            protocol(),
            max_classes=2,
        ).matrix
        for ids in (short, padded)
    ]
    assert_close(found[1].dense(), found[0].dense(), relative=1e-12)


def test_a_loss_that_is_not_finite_is_told_before_labels_are_drawn():
    toy = perceptron()
    batches = [(toy.batch[0] * torch.nan, toy.batch[1])]
    with pytest.raises(CriterionError, match="not finite"):
        gauss_newton(toy.model, toy.groups, batches, protocol(), max_classes=2)


def test_drawn_tokens_give_the_gauss_newton_matrix_in_the_mean():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 5))
    model.double()
    groups = {"n": group("n", "neuron", 4, [("2", -1, None)])}
    inputs, labels = torch.randn(2, 4, 3, dtype=torch.float64), torch.randint(5, (2, 4))
    labels[0, 2:] = -100
    expected = 0
    for n, t in ((0, 0), (1, 0), (1, 1), (1, 2)):  # the tokens before one that has a label

        def logits(gate, n=n, t=t):
            return model[2](model[1](model[0](inputs[n, t])) * gate)

        ones = torch.ones(4, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(logits, ones)
        share = logits(ones).detach().softmax(-1)
        expected = expected + jacobian.T @ _softmax_curvature(share) @ jacobian / 4
    found = gauss_newton(
        model, groups, [(inputs, labels)], Protocol(next_token), num_draws=4000, max_classes=2
    )
    assert not found.exact
    assert_close(found.matrix, expected, relative=0.05)


def test_gates_on_a_weight_have_no_samples():
    toy = attention(num_samples=3)
    with pytest.raises(CriterionError, match=r"down\.weight: .* neurons .* all samples share"):
        gauss_newton(toy.model, toy.groups, [toy.batch])


def test_rows_of_a_process_that_waits_for_others_count_once(monkeypatch):
    toy = perceptron()
    expected = gauss_newton(toy.model, toy.groups, [toy.batch], Protocol(F.cross_entropy)).matrix
    monkeypatch.setattr("sosp_hub.derivatives.average.is_sharded", lambda _: True)
    busy = iter([1.0, 1.0, 1.0, 0.0])  # two rounds more than this process has batches

    def process_sum(numbers):
        return torch.tensor([next(busy), 0.0]) if numbers.shape == (2,) else numbers

    protocol = Protocol(F.cross_entropy, process_sum=process_sum)
    found = gauss_newton(toy.model, toy.groups, [toy.batch], protocol).matrix
    assert_close(found, expected, relative=1e-12)


def test_one_group_that_does_not_reach_the_loss_is_told():
    toy = perceptron()
    name = next(iter(toy.groups))
    size = toy.groups[name].size

    class Deaf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.aside = toy.model, torch.nn.Linear(4, size).double()

        def forward(self, x):
            self.aside(x)
            return self.inside(x)

    groups = {"aside": group("aside", "neuron", 4, [("aside", -1, None)])}
    inside = [(f"inside.{site.module}", site.dim, site.index) for site in toy.groups[name].sites]
    groups["inside"] = group("inside", "neuron", size, inside)
    with pytest.raises(CriterionError, match="does not depend on the gates of 'aside'"):
        gate_gradient(Deaf(), groups, [toy.batch], protocol())


def test_a_batch_without_a_label_that_counts_changes_nothing():
    toy = perceptron()
    x, labels = toy.batch
    batches = [(x, labels), (x, torch.full_like(labels, -100))]
    expected = gate_gradient(toy.model, toy.groups, batches[:1], protocol())
    for order in (batches, batches[::-1]):
        found = gate_gradient(toy.model, toy.groups, order, protocol())
        assert_close(found.gradient, expected.gradient, relative=1e-12)
        assert_close(found.loss, expected.loss, relative=1e-12)
