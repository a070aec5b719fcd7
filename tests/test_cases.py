"""The catalogue holds what it says: models that run, repeat, and learn from their batch."""

import pytest
import torch

from tests.cases import CASES, with_trait
from tests.compare import assert_close


def run(model, inputs):
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return getattr(output, "logits", output)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_is_small_and_the_same_each_time(case):
    model = case.model()
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    logits = run(model, case.inputs())
    assert len(logits) == 2
    assert logits.std() > 0
    assert_close(run(case.model(), case.inputs()), logits, relative=0)


def test_names_differ_and_traits_are_found():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) == 14
    assert {case.name for case in with_trait("gqa")} == {"llama", "qwen3"}
    with pytest.raises(AssertionError, match="no case"):
        with_trait("gqa", "depthwise")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_batch_has_labels_within_the_head(case):
    batch = case.batch(3)
    labels = batch["labels"] if isinstance(batch, dict) else batch[1]
    logits = run(case.model(), case.inputs(3))
    assert len(labels) == 3
    assert 0 <= labels.min() <= labels.max() < logits.shape[-1]
