"""What print() shows of a graph, of scores and of a plan: a screen, with nothing wrong in it."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sosp_hub
from sosp_hub.plan import PruningPlan
from sosp_hub.scoring import Scores
from sosp_hub.summary import Summary, alike, span, table
from tests.cases import CASES

NAMES = st.lists(st.from_regex(r"[a-c]?(\.?[0-9]{1,2}){0,3}\.[a-c]", fullmatch=True), unique=True)


@given(NAMES)
def test_every_name_is_in_one_row_which_stands_for_names_that_differ_in_numbers(names):
    rows = alike(names)
    assert sorted(name for members in rows.values() for name in members) == sorted(names)
    for pattern, members in rows.items():
        if len(members) == 1:
            assert pattern == members[0]
        else:
            regex = re.escape(pattern).replace(r"\*", r"\d+")
            assert all(re.fullmatch(regex, name) for name in members)


def test_one_screen_says_how_much_it_leaves_out():
    rows = [(f"g{i}", i) for i in range(100)]
    text = table(("name", "size"), rows)
    assert len(text.splitlines()) == 42
    assert text.endswith("and 60 more rows")
    page = Summary(("above",), ("name", "size"), rows, ("below",)).html()
    assert page.startswith("<p>above</p><table>")
    assert page.endswith("</table><p>and 60 more rows</p><p>below</p>")
    assert page.count("<tr>") == 41
    widths = {len(line) for line in text.splitlines()[:-1]}
    assert len(widths) == 1  # numbers end under one another


@pytest.mark.parametrize(
    ("values", "text"), [([3, 3], "3"), ([2, 64], "2 to 64"), ([12_345], "12,345")]
)
def test_a_span_is_one_number_where_both_ends_are_the_same(values, text):
    assert span(values) == text


def test_a_plan_and_scores_print_what_they_hold():
    plan = PruningPlan(
        kept={"layers.0.up:neuron": (0, 2), "layers.1.up:neuron": (1,), "head:channel": (0, 1)},
        sizes={"layers.0.up:neuron": 4, "layers.1.up:neuron": 4, "head:channel": 2},
    )
    lines = [" ".join(line.split()) for line in str(plan).splitlines()]
    assert lines == [
        "plan: 5 of 10 structures kept in 3 groups; all other groups stay whole",
        "group groups size kept share",
        "layers.*.up:neuron 2 4 1 to 2 38%",
        "head:channel 1 2 2 100%",
    ]
    scores = Scores({"a.0.b": torch.tensor([1.0, 2.0]), "a.1.b": torch.tensor([-0.5])})
    lines = [" ".join(line.split()) for line in str(scores).splitlines()]
    assert lines == [
        "3 scores; higher = keep",
        "group groups structures least median greatest",
        "a.*.b 2 3 -0.5 1 2",
    ]


def test_scores_are_the_dictionary_that_they_were():
    case = CASES[0]
    model = case.model().eval()
    graph = sosp_hub.trace(model, case.inputs())
    scores = sosp_hub.score(model, graph, [], criterion="magnitude")
    assert isinstance(scores, dict)
    assert scores == dict(scores)
    assert len(str(graph).splitlines()) <= len(graph.describe().splitlines())
    assert "graph.describe()" in str(graph)


def test_a_notebook_gets_a_table_and_no_markup_of_a_stranger():
    plan = PruningPlan(kept={"<script>": (0,)}, sizes={"<script>": 2})
    page = plan._repr_html_()
    assert "<script>" not in page
    assert '<td style="text-align:left">&lt;script&gt;</td>' in page
    assert page.count("<table>") == 1


def test_names_of_strangers_give_a_terminal_no_orders():
    name = "a\x1b]0;owned\x07\x1b[2J\n:neuron"
    text = str(PruningPlan(kept={name: (0,)}, sizes={name: 2}))
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert len(text.splitlines()) == 3


def test_nothing_is_printed_as_nothing():
    assert str(Scores({})).startswith("0 scores")
    assert str(PruningPlan(kept={}, sizes={})).startswith("plan: 0 of 0 structures")
