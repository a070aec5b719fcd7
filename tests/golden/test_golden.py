"""Graphs of real architectures as reviewed text; `pytest tests/golden --regenerate` writes them.

A change here is a change of what is cut together, whoever made it: read the diff before it is
committed. The first line of a file says with which version its text was last written.
"""

from pathlib import Path

import pytest
import timm
import torch
import transformers

from sosp_hub.structure.trace import trace
from tests.bench.families import FAMILIES
from tests.cases import CASES

FOLDER = Path(__file__).parent
VERSIONS = {"timm": timm.__version__, "transformers": transformers.__version__}
CHOSEN = (
    "mixtral", "bloom", "gpt_neox", "phi3", "mamba", "t5", "whisper", "swin", "convnext",
    "llava",
)  # fmt: skip


def _of_case(case):
    outputs = None if case.library == "timm" else "logits"
    return case.library, lambda: (case.model(), case.inputs(), outputs)


def _of_family(family):
    return "transformers", lambda: (family.build(), family.inputs(), family.outputs)


GRAPHS = {case.name: _of_case(case) for case in CASES} | {
    family.name: _of_family(family) for family in FAMILIES if family.name in CHOSEN
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_is_as_it_was_reviewed(name, regenerate):
    library, build = GRAPHS[name]
    torch.manual_seed(0)
    model, inputs, outputs = build()
    text = str(trace(model, inputs, outputs)) + "\n"
    path = FOLDER / f"{name}.txt"
    written, _, expected = path.read_text().partition("\n") if path.exists() else ("", "", "")
    if regenerate and text != expected:
        path.write_text(f"# {library} {VERSIONS[library]}\n{text}")
        return
    assert text == expected, (
        f"written with {written.removeprefix('# ')}, this is {library} {VERSIONS[library]}: "
        f"`pytest tests/golden --regenerate`, then read the diff"
    )


def test_two_traces_give_the_same_text():
    """Nothing in the text depends on the run: no ids, no order of sets."""
    case = CASES[0]
    assert str(trace(case.model(), case.inputs())) == str(trace(case.model(), case.inputs()))


def test_no_file_is_left_over():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(GRAPHS)
