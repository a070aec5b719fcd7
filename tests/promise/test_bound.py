"""Bounds on what is lost, against textbook tests, and how often they are wrong."""

import math

import pytest
import torch

from sosp_hub.promise.bound import lost_quality, samples_needed
from sosp_hub.promise.search import smallest
from sosp_hub.recipe.metrics import Drop, read_drops
from tests.compare import assert_close

METRICS = ("accuracy", "loss", "perplexity", "per_class_accuracy", "root_mean_squared_error")


def ones(x):
    return torch.stack([x.double(), torch.ones(len(x), dtype=torch.float64)], dim=1)


def test_a_paired_mean_is_bounded_like_students_t_test():
    from scipy import stats

    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(400, generator=generator).double()
    pruned = dense + 0.1 * torch.randn(400, generator=generator)
    found = lost_quality(Drop("loss", 0.01), ones(dense), ones(pruned))
    difference = (pruned - dense).double().numpy()
    interval = stats.ttest_1samp(difference, 0, alternative="less").confidence_interval(0.95)
    assert_close(found.value, float(difference.mean()), relative=1e-9)
    skew = 1e-4  # what Johnson's correction may add to a symmetric spread
    assert interval.high - 1e-6 <= found.upper <= interval.high + skew
    assert found.holds == (found.upper <= 0.01)


def test_the_spread_tells_the_bound_on_so_many_more_samples():
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(400, generator=generator).double()
    pruned = dense + 0.1 * torch.rand(400, generator=generator).square()
    drop = Drop("loss", 0.01)
    told = lost_quality(drop, ones(dense), ones(pruned), spread=0.5)
    more = lost_quality(drop, ones(dense.repeat(4)), ones(pruned.repeat(4)))
    few = lost_quality(drop, ones(dense), ones(pruned))
    assert_close(told.upper - told.value, more.upper - more.value, relative=1e-2)
    assert few.upper - few.value > 1.9 * (more.upper - more.value)


def test_a_ratio_of_sums_has_the_spread_of_the_jackknife():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 60, (300,), generator=generator).double()
    dense = torch.stack([3 * tokens * (1 + 0.1 * torch.randn(300, generator=generator)), tokens], 1)
    pruned = dense.clone()
    pruned[:, 0] += tokens * (0.05 + 0.02 * torch.randn(300, generator=generator))
    found = lost_quality(Drop("perplexity", 0.06, relative=True), dense, pruned, confidence=0.95)

    def change(rows):
        x, w = rows[:, 0].sum(), rows[:, 1].sum()
        return (x / w).item()

    left = [[i for i in range(300) if i != gone] for gone in range(300)]
    each = torch.tensor([change(pruned[i]) - change(dense[i]) for i in left])
    error = math.sqrt(299 / 300 * (each - each.mean()).square().sum().item())
    value = change(pruned) - change(dense)
    assert_close(found.value, math.expm1(value), relative=1e-9)
    assert_close(math.log1p(found.upper), value + 1.650 * error, relative=1e-2)


def test_nothing_lost_on_few_samples_proves_nothing():
    right = ones(torch.ones(200))
    assert not lost_quality(Drop("accuracy", 0.01), right, right).holds
    right = ones(torch.ones(300))
    assert lost_quality(Drop("accuracy", 0.01), right, right).holds
    assert samples_needed(Drop("accuracy", 0.01), 0.95) == 299  # 0.99^299 < 0.05


def test_a_share_of_errors_is_bounded_as_that_of_what_is_right():
    right = (torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    after = right.clone()
    after[right.nonzero()[:3]] = 0
    for pruned in (right, after):
        rate = lost_quality(Drop("word_error_rate", 0.01), ones(1 - right), ones(1 - pruned))
        share = lost_quality(Drop("accuracy", 0.01), ones(right), ones(pruned))
        assert_close(rate.value, share.value, relative=1e-9)
        assert_close(rate.upper, share.upper, relative=1e-9)


@pytest.mark.parametrize(
    ("drop", "dense", "pruned", "value"),
    [
        (Drop("accuracy", 0.01), 0.8, 0.75, 0.05),
        (Drop("accuracy", 0.1, relative=True), 0.8, 0.72, 0.1),
        (Drop("loss", 0.5), 2.0, 2.25, 0.25),
        (Drop("loss", 0.2, relative=True), 2.0, 2.5, 0.25),
        (Drop("perplexity", 0.2, relative=True), 2.0, 2.25, math.expm1(0.25)),
        (Drop("root_mean_squared_error", 0.6, relative=True), 4.0, 9.0, 0.5),
        (Drop("divergence", 0.05), 0.0, 0.04, 0.04),
    ],
    ids=lambda value: value.words() if isinstance(value, Drop) else None,
)
def test_the_value_is_in_the_unit_that_was_asked_for(drop, dense, pruned, value):
    rows = [torch.full((100_000,), x) for x in (dense, pruned)]
    found = lost_quality(drop, *map(ones, rows))
    assert_close(found.value, value, relative=2e-3)
    assert found.holds == (value < drop.amount)


CASES = {
    "accuracy, rarely": (Drop("accuracy", 0.02), 400),
    "accuracy, both ways": (Drop("accuracy", 0.01), 800),
    "skewed divergence": (Drop("divergence", 0.05), 300),
    "tokens": (Drop("perplexity", 0.03, relative=True), 300),
}


def draw(case, drop, number, generator):
    """Rows of two models whose true loss is exactly what is allowed."""
    uniform = torch.rand(number, generator=generator)
    if case == "accuracy, rarely":
        return ones(torch.ones(number)), ones(uniform >= drop.amount)
    if case == "accuracy, both ways":
        dense = ((uniform < 0.75) | (uniform > 0.95)).double()
        pruned = ((uniform >= 0.05 + drop.amount) & (uniform < 0.80) | (uniform > 0.95)).double()
        return ones(dense), ones(pruned)
    if case == "skewed divergence":  # squares of a normal variable
        x = torch.randn(number, generator=generator).square()
        return ones(torch.zeros(number)), ones(drop.amount * x)
    tokens = torch.randint(5, 60, (number,), generator=generator).double()
    noise = 0.1 * torch.randn(number, generator=generator)
    change = math.log1p(drop.amount)
    dense = torch.stack([3 * tokens, tokens], 1)
    return dense, torch.stack([tokens * (3 + change + noise), tokens], 1)


@pytest.mark.parametrize("case", CASES)
def test_at_the_edge_it_is_wrong_in_one_of_twenty(case):
    drop, number = CASES[case]
    generator = torch.Generator().manual_seed(0)
    draws = 1000
    wrong = sum(
        lost_quality(drop, *draw(case, drop, number, generator)).holds for _ in range(draws)
    )
    assert wrong <= 0.05 * draws + 2 * math.sqrt(0.05 * 0.95 * draws)
    assert wrong >= 0.01 * draws  # neither is it afraid


def test_a_search_does_not_wear_out_the_confidence():
    """Bisection on the samples of the proof themselves would be wrong twice as often."""
    drop, draws, wrong, kept = Drop("accuracy", 0.02), 300, 0, []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        number = 1200
        dense = torch.ones(number)
        orders = torch.rand(8192, generator=generator)

        def probe(share, number=number, orders=orders, generator=generator):
            flips = torch.rand(number, generator=generator)  # models err on samples of their own
            return {"macs": share}, {"accuracy": ones(flips >= 0.05 * (1 - share))}

        promise = smallest([drop], {"accuracy": ones(dense)}, probe, least=0.1)
        if promise.point:
            wrong += 0.05 * (1 - promise.point.macs) > drop.amount
            kept.append(promise.point.macs)
    assert wrong <= 0.05 * draws + 2 * math.sqrt(0.05 * 0.95 * draws)
    assert len(kept) > 0.9 * draws
    assert sum(kept) / len(kept) < 0.85  # 0.6 would be the edge


def test_the_search_does_not_see_the_samples_of_the_proof():
    dense = ones(torch.ones(900))

    def tried(proof):
        shares = []

        def probe(share):
            shares.append(share)
            search = torch.ones(300) if share > 0.4 else torch.zeros(300)
            return {"macs": share}, {"accuracy": ones(torch.cat([search, proof]))}

        smallest((Drop("accuracy", 0.1),), {"accuracy": dense}, probe, least=0.1)
        return shares

    assert tried(torch.zeros(600)) == tried(torch.ones(600))


def test_the_search_expects_the_bound_of_the_proof():
    """It sees half as many samples; with their own bound it would stop too early."""
    part = torch.rand(300, generator=torch.Generator().manual_seed(0)).double()
    dense = {"loss": ones(torch.zeros(900))}
    promise = smallest(
        [Drop("loss", 0.3)], dense, lambda s: ({"macs": s}, {"loss": ones(part.repeat(3))}),
        least=0.1, num_probes=2,
    )  # fmt: skip
    for point in promise.curve:
        search, proof = point.search["loss"], point.proof["loss"]
        assert_close(search.value, proof.value, relative=1e-9)
        assert_close(search.upper - search.value, proof.upper - proof.value, relative=1e-2)


@pytest.mark.parametrize("edge", [0.0, 0.6, 1.0])
def test_all_bounds_guide_the_search_between_what_can_be_reached(edge):
    """What is tried besides is larger than what the search found."""
    dense, shares = {name: ones(torch.ones(900)) for name in ("accuracy", "loss")}, []

    def probe(share):
        shares.append(share)
        worse = torch.full((900,), 1.0 if share > edge else 2.0)
        return {"macs": share}, {"accuracy": ones(torch.ones(900)), "loss": ones(worse)}

    drops = [Drop("accuracy", 0.1), Drop("loss", 0.1)]
    promise = smallest(drops, dense, probe, least=0.3)
    assert min(shares) > 0.3
    found = min([share for share in shares[:6] if share > edge], default=1.0)
    assert all(share >= found for share in shares[6:])
    if edge < 1:
        assert promise.point.macs == found
        assert found - max(edge, 0.3) <= 0.7 / 2**6
    else:
        assert promise.point is None


def test_nothing_smaller_than_what_fails_is_chosen():
    """It may pass by luck: with each one more that is tested, more often than was promised."""

    def probe(share):
        right = torch.ones(1200)
        right[400:520] = 0.0 if 0.5 < share < 0.6 else 1.0  # of the proof alone
        return {"macs": share}, {"accuracy": ones(right)}

    dense = {"accuracy": ones(torch.ones(1200))}
    promise = smallest([Drop("accuracy", 0.02)], dense, probe, least=0.1, num_probes=3)
    holds = [point.holds for point in promise.curve]
    assert holds == [True, False, *[True] * 4]
    assert promise.chosen == 0
    assert promise.point.macs > 0.6


@pytest.mark.parametrize(
    ("given", "drop"),
    [
        ({"accuracy": 1}, Drop("accuracy", 0.01)),
        ({"accuracy": "1 %"}, Drop("accuracy", 0.01, relative=True)),
        ({"perplexity": "5%"}, Drop("perplexity", 0.05, relative=True)),
        ({"divergence": 0.05}, Drop("divergence", 0.05)),
        ({"loss": 0.1}, Drop("loss", 0.1)),
    ],
)
def test_drops_as_people_write_them(given, drop):
    assert read_drops(given, METRICS) == (drop,)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"acuracy": 1}, "did you mean 'accuracy'"),
        ({"per_class_accuracy": 1}, "no such metric"),
        ({"accuracy": 0}, "more than 0"),
        ({"accuracy": 100}, "less than 100"),
        ({"accuracy": "100%"}, "a share of what there is"),
        ({"accuracy": "five"}, "such as 5%"),
        ({"perplexity": 2.0}, "a percentage of the dense"),
        ({"root_mean_squared_error": 2.0}, "a percentage of the dense"),
        ({"divergence": "5%"}, "a number such as 0.05"),
        ({"accuracy": True}, "more than 0"),
        ({"nll": 0.1}, "tell whether less of it is better"),
    ],
)
def test_drops_that_are_none(given, told):
    with pytest.raises(ValueError, match=told):
        read_drops(given, (*METRICS, "nll"))
