"""What a comparison says follows from its numbers, and from nothing else."""

import csv
import io
import json
import math

import pytest

from sosp_hub.report.study import write_comparison
from sosp_hub.report.study_numbers import Compared
from tests.compare import assert_close


def cell(criterion, budget, seed, value, metric="accuracy", macs=50):
    found = {"value": value, "n": 100, "stderr": 0.01}
    return {
        "criterion": criterion,
        "budget": budget,
        "seed": seed,
        "metrics": {"cut": {metric: found}},
        "cost": {
            "before": {"macs": 100, "params": 10, "bytes": 40},
            "after": {"macs": macs, "params": 4, "bytes": 16},
        },
        "structures": {"before": 8, "after": 4},
        "floors": 0,
        "latency": {},
        "scoring": {"seconds": 1.5, "peak_bytes": None},
    }


def results(values, metric="accuracy", dense=0.9):
    """Of one budget, from the values of each criterion's seeds."""
    seeds = range(len(next(iter(values.values()))))
    return {
        "command": "python -m sosp_hub.compare recipe.yaml",
        "recipe": "",
        "model": "toy",
        "criteria": [
            {
                "label": label,
                "kinds": ["channel"],
                "name": label.split()[0],
                "compensate": label.endswith("compensate"),
            }
            for label in values
        ],
        "budgets": ["macs 0.5"],
        "seeds": list(seeds),
        "dense": {str(seed): {metric: {"value": dense, "n": 100}} for seed in seeds},
        "cells": [
            cell(label, "macs 0.5", seed, mine[seed], metric)
            for label, mine in values.items()
            for seed in seeds
        ],
        "rank_correlations": [
            {"kinds": ["channel"], "criteria": ["a", "b"], "matrix": [[1.0, None], [None, 1.0]]}
        ],
    }


def test_a_difference_is_taken_within_each_seed():
    """The seeds differ by 20 points and the criteria by 2: it is larger than their spread."""
    found = Compared(results({"a": [0.5, 0.7, 0.6], "b": [0.52, 0.721, 0.619]}))
    (lead,) = found.leads("macs 0.5", "cut")
    assert (lead.better, lead.worse) == ("b", "a")
    assert_close(lead.by.values, (0.02, 0.021, 0.019))
    assert_close(lead.by.std, 0.001)
    assert lead.is_real
    assert str(lead) == "+2 ± 0.1 points"


@pytest.mark.parametrize(
    ("third", "is_real"), [(0.09, False), (0.1, True)], ids=["0.2300 < 0.2425", "0.2333 > 0.2309"]
)
def test_the_rule_is_twice_the_standard_deviation(third, is_real):
    """Mean and twice the standard deviation of (.3, .3, third) are in the names of the cases."""
    found = Compared(results({"a": [0.0, 0.0, 0.0], "b": [0.3, 0.3, third]}))
    (lead,) = found.leads("macs 0.5", "cut")
    assert lead.is_real is is_real


def test_of_a_perplexity_the_least_leads_and_its_logarithm_counts():
    found = Compared(results({"a": [20.0, 40.0], "b": [30.0, 62.0]}, "perplexity", dense=15.0))
    (lead,) = found.leads("macs 0.5", "cut")
    assert lead.better == "a"
    assert_close(lead.by.values, (math.log(1.5), math.log(1.55)))
    assert str(lead) == "+52.5 ± 2.3 %"


def test_one_seed_claims_nothing():
    found = Compared(results({"a": [0.2], "b": [0.9]}))
    (lead,) = found.leads("macs 0.5", "cut")
    assert lead.by.std is None
    assert not lead.is_real


def test_compensation_is_compared_with_the_same_criterion_without():
    values = {"a": [0.5, 0.5], "b": [0.1, 0.1], "a compensate": [0.6, 0.7]}
    (change,) = Compared(results(values)).compensations("macs 0.5", "cut")
    assert (change.better, change.worse) == ("a compensate", "a")
    assert_close(change.by.values, (0.1, 0.2))


def test_the_files_hold_every_cell(tmp_path):
    values = {"a": [0.5, 0.6, 0.7], "b": [0.1, 0.1, 0.11], "b compensate": [0.5, 0.58, 0.7]}
    write_comparison(results(values), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json",
        "results.csv",
        "table.md",
        "report.html",
        "pareto_macs.png",
        "pareto_params.png",
        "ranks.png",
    }
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [(row["criterion"], float(row["accuracy_cut"])) for row in rows] == [
        (label, value) for label, mine in values.items() for value in mine
    ]
    record = json.loads((tmp_path / "results.json").read_text())
    first = record["summary"][0]["metrics"]["cut"]["accuracy"]
    assert first == {"mean": 0.6, "std": pytest.approx(0.1), "values": [0.5, 0.6, 0.7]}
    table = (tmp_path / "table.md").read_text()
    assert "| a | 60.0 ± 10.0 % | 50.0 % | 40.0 % |" in table
    assert table.index("| a |") < table.index("| b compensate |") < table.index("| b |")
    assert "a leads by more than the seed spread over b (+49.7 ± 9.5 points); within" in table
    assert "against the same without compensation: b compensate +49" in table
    page = (tmp_path / "report.html").read_text()
    assert "a leads by more than the seed spread" in page
    assert page.count("data:image/svg+xml") == 3


def test_what_was_before_the_cut_stands_before_what_is_after(tmp_path):
    found = results({"a": [0.5, 0.6]})
    on = {"hardware": "a CPU", "threads": 2, "batch": 8, "dtype": "float32"}
    for each in found["cells"]:
        each["latency"] = {"before": {"seconds": 0.02, **on}, "after": {"seconds": 0.005, **on}}
    write_comparison(found, tmp_path, figures=False)
    for row in csv.DictReader((tmp_path / "results.csv").read_text().splitlines()):
        pairs = [("macs", ""), ("params", ""), ("structures", ""), ("latency", "_s")]
        told = [[float(row[f"{k}_{when}{s}"]) for when in ("before", "after")] for k, s in pairs]
        assert told == [[100, 50], [10, 4], [8, 4], [0.02, 0.005]]
    assert "| 50.0 % | 40.0 % | 25 % |" in (tmp_path / "table.md").read_text()


def test_criteria_that_keep_unequal_costs_are_told(tmp_path):
    found = results({"a": [0.5, 0.6], "b": [0.1, 0.1]})
    write_comparison(found, tmp_path, figures=False)
    assert "equal cost" not in (tmp_path / "table.md").read_text()
    for one in found["cells"][:2]:
        one["cost"]["after"]["macs"] = 60
    write_comparison(found, tmp_path, figures=False)
    assert "from 50 % to 60 % of the MACs" in (tmp_path / "table.md").read_text()


def test_of_many_that_are_clearly_behind_the_nearest_are_named(tmp_path):
    found = results({name: [0.1 * place] * 2 for place, name in enumerate("abcdefg")})
    found["cells"][0]["floors"] = 2
    write_comparison(found, tmp_path, figures=False)
    table = (tmp_path / "table.md").read_text()
    assert "over f (+10 ± 0 points), e (" in table
    assert ", c (+40 ± 0 points) and 2 more." in table
    assert "In 1 of 14 cells a floor" in table
    assert len(json.loads((tmp_path / "results.json").read_text())["differences"]) == 6


def test_without_figures_there_is_no_page(tmp_path):
    write_comparison(results({"a": [0.5]}), tmp_path, figures=False)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.json", "results.csv", "table.md"}
    assert "nothing is said about any difference" in (tmp_path / "table.md").read_text()


def test_tables_do_not_depend_on_the_encoding_of_the_system(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "text_encoding", lambda encoding, level=2: encoding or "ascii")
    found = results({"a": [0.5, 0.7], "\N{GREEK SMALL LETTER ALPHA}": [0.52, 0.71]})
    write_comparison(found, tmp_path, figures=False)
    assert "\N{PLUS-MINUS SIGN}" in (tmp_path / "table.md").read_text("utf-8")
    assert "\N{GREEK SMALL LETTER ALPHA}" in (tmp_path / "results.csv").read_text("utf-8")
