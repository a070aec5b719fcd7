"""Windows of series: what is held out lies behind what is trained with."""

import json

import pytest
import transformers

from sosp_hub.data.processing import OwnProcessing
from sosp_hub.data.source import open_data
from sosp_hub.recipe.schema import DataSection
from sosp_hub.recipe.tasks import find_task

TASK = find_task("time-series-forecasting")
CONFIG = transformers.PatchTSTConfig(num_input_channels=1, context_length=16, prediction_length=4)


def windows(folder, processor, name, **keys):
    """First and last time of the past and of the future of each window; values are times."""
    rows = [{"target": [float(i) for i in range(100)]}, {"target": [float(i) for i in range(60)]}]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    section = DataSection(path=str(folder / "rows.jsonl"), test=None, **keys)
    split = TASK.split(open_data(section, TASK.name), name, processor, augment=False)
    batch = split.__getitems__(range(len(split)))
    pairs = zip(batch["past_values"].squeeze(-1), batch["future_values"].squeeze(-1), strict=True)
    return [(p[0].item(), p[-1].item(), f[0].item(), f[-1].item()) for p, f in pairs]


def test_the_future_of_test_windows_is_seen_by_no_train_window(tmp_path):
    processor = OwnProcessing(None, CONFIG)
    train = windows(tmp_path, processor, "train")
    test = windows(tmp_path, processor, "test")
    for start, end, first, last in (*train, *test):
        assert (end - start, first - end, last - first) == (15, 1, 3)
    assert max(last for *_, last in train) == 79  # of 100, of which a fifth is held out
    futures = sorted({(first, last) for _, _, first, last in test})
    assert futures == [
        *((48.0, 51.0), (52.0, 55.0), (56.0, 59.0)),
        *((80.0, 83.0), (84.0, 87.0), (88.0, 91.0), (92.0, 95.0), (96.0, 99.0)),
    ]
    assert len({(first, last) for _, _, first, last in train}) < len(train) < 31
    assert windows(tmp_path, processor, "test", num_test=3) != test[:3]
    assert len(windows(tmp_path, processor, "test", num_test=3)) == 3


@pytest.mark.parametrize("name", ["train", "test"])
def test_models_that_read_lags_get_more_of_the_past(tmp_path, name):
    config = transformers.TimeSeriesTransformerConfig(
        context_length=16, prediction_length=4, lags_sequence=[1, 5], num_time_features=2
    )
    made = windows(tmp_path, OwnProcessing(None, config), name)
    assert {end - start for start, end, *_ in made} == {20}
