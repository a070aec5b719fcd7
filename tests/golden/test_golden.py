"""Graphs of real architectures as reviewed text; `pytest tests/golden --regenerate` writes them.

A change here is a change of what is cut together, whoever made it: read the diff before it is
committed. The first line of a file says with which version its text was last written.
"""

from pathlib import Path

import pytest
import timm
import torch
import transformers
from packaging.version import Version

from sosp_hub.structure.trace import trace
from tests.bench.families import FAMILIES
from tests.cases import CASES

pytestmark = pytest.mark.slow

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


def reviewed(library, name):
    """Texts that are right here, the one of the newest version first.

    Where an older version of a library has other code, so that another graph is right, its text
    lies in ``older/`` and holds for versions before that of the newer text.
    """
    newer, *older = (FOLDER / f"{name}.txt", FOLDER / "older" / f"{name}.txt")
    written, _, text = newer.read_text().partition("\n")
    yield text
    if Version(VERSIONS[library]) < Version(written.rpartition(" ")[2]):
        yield from (path.read_text().partition("\n")[2] for path in older if path.exists())


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_is_as_it_was_reviewed(name, regenerate):
    library, build = GRAPHS[name]
    torch.manual_seed(0)
    model, inputs, outputs = build()
    text = trace(model, inputs, outputs).describe() + "\n"
    path = FOLDER / f"{name}.txt"
    if regenerate and (not path.exists() or text not in reviewed(library, name)):
        path.write_text(f"# {library} {VERSIONS[library]}\n{text}")
    expected, *others = reviewed(library, name)
    if text not in others:
        assert text == expected, (
            f"{library} {VERSIONS[library]}: `pytest tests/golden --regenerate`, then read the diff"
        )


def test_two_traces_give_the_same_text():
    """Nothing in the text depends on the run: no ids, no order of sets."""
    case = CASES[0]
    texts = [trace(case.model(), case.inputs()).describe() for _ in range(2)]
    assert texts[0] == texts[1]


def test_no_file_is_left_over():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(GRAPHS)
    assert {path.stem for path in FOLDER.glob("older/*.txt")} < set(GRAPHS)
