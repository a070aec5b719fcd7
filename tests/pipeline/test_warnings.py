"""What a run says when fine-tuning made a metric of the test split worse."""

import pytest

from sosp_hub.pipeline.run import _warn_of_recovery

pytestmark = pytest.mark.slow


def metric(value, stderr):
    return {"value": value, "n": 100, "stderr": stderr}


@pytest.mark.parametrize(
    ("name", "before", "after", "warned"),
    [
        ("accuracy", (0.625, 0.02), (0.46, 0.02), True),
        ("accuracy", (0.625, 0.02), (0.61, 0.02), False),  # within the standard errors
        ("accuracy", (0.625, 0.02), (0.70, 0.02), False),
        ("perplexity", (40.0, 1.0), (50.0, 1.0), True),
        ("perplexity", (40.0, 1.0), (30.0, 1.0), False),
        ("loss", (1.0, None), (1.1, None), True),
    ],
)
@pytest.mark.parametrize("recalibrated", [False, True])
def test_a_metric_that_fell_is_said_with_the_keys_to_change(
    name, before, after, warned, recalibrated, caplog
):
    metrics = {"cut": {name: metric(*before)}, "final": {name: metric(*after)}}
    if recalibrated:  # fine-tuning began with this, whatever the cut was
        metrics["cut"][name] = metric(*after)
        metrics = {
            "cut": metrics["cut"],
            "recalibrated": {name: metric(*before)},
            "final": metrics["final"],
        }
    _warn_of_recovery(metrics)
    assert ("finetune.learning_rate" in caplog.text) is warned
    assert (name in caplog.text) is warned
