"""What a run says of too little memory, and when fine-tuning made a metric worse."""

import pytest

import sosp_hub
from sosp_hub.pipeline import forecast
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


def test_what_will_not_fit_is_said_before_it_begins(recipe, monkeypatch, caplog):
    sosp_hub.prune(recipe)
    assert "of memory" not in caplog.text
    monkeypatch.setattr(forecast, "_free_ram", lambda: 1 << 20)
    sosp_hub.prune(recipe, overwrite=True)
    told = [record.message for record in caplog.records if "of memory" in record.message]
    (scores,) = [line for line in told if line.startswith("saliency will take about")]
    assert "more than is free here; write criterion.batch_size=2" in scores
