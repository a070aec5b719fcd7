"""What comes next in a series of numbers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import OwnTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sosp_hub.data.rows import Rows, TableRows
    from sosp_hub.data.source import DataInfo, OpenData
    from sosp_hub.data.split import Split
    from sosp_hub.tasks.metrics import OfAll


@register
class TimeSeriesForecasting(OwnTask):
    """Series of numbers, one a row; windows of as many times as the model's config says.

    Where no test split is named the end of each series is held out, not series at random. The loss
    is the model's own: squared error, or the likelihood of a distribution, whose curvature is not
    known.
    """

    name: ClassVar[str] = "time-series-forecasting"
    auto_class: ClassVar[str] = "AutoModel"
    by_type: ClassVar["Mapping[str, str]"] = {
        "patchtst": "PatchTSTForPrediction",
        "patchtsmixer": "PatchTSMixerForPrediction",
        "time_series_transformer": "TimeSeriesTransformerForPrediction",
    }
    tokens: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("series",)
    head: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = (
        *("mean_absolute_error", "root_mean_squared_error", "loss"),
    )
    of_all: ClassVar[tuple[str, ...]] = ("mean_absolute_error", "root_mean_squared_error")
    counted: ClassVar[str] = "windows"
    pretrained_rate: ClassVar[float] = 1e-4
    has_pipeline: ClassVar[bool] = False

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Lists of numbers, or lists of such lists: one for each channel."""
        import numpy as np

        from sosp_hub.data.columns import values_of
        from sosp_hub.data.rows import TableRows
        from sosp_hub.errors import DataError

        lists = values_of(table, section, "series", where, list, "a list of numbers")
        series = []
        for row, values in enumerate(lists):
            try:
                array = np.asarray(values, np.float32)
            except (TypeError, ValueError):
                array = np.zeros(0, np.float32)
            if array.ndim not in (1, 2) or not array.size or not np.isfinite(array).all():
                raise DataError(
                    f"data.series: row {row} of {where} is no list of finite numbers, or of lists "
                    "of the same length, one for each channel; fill gaps"
                )
            series.append(array[:, None] if array.ndim == 1 else array.T)  # times x channels
        return TableRows({"series": series}, where)

    def prepare(self, data: "OpenData") -> "OpenData":
        """As it is: windows are cut first, and then subsets drawn."""
        return data

    def split(self, data: "OpenData", name: str, processor: Any, *, augment: bool) -> "Split":
        """Windows, the last of each series at its end."""
        from functools import partial

        from sosp_hub.data.loading import wrong_kind
        from sosp_hub.data.processing import OwnProcessing
        from sosp_hub.data.rows import TableRows
        from sosp_hub.data.split import MadeSplit
        from sosp_hub.errors import DataError

        del augment
        rows = data.train if name == "train" else data.test
        if not isinstance(rows, TableRows) or not isinstance(processor, OwnProcessing):
            raise wrong_kind(data)
        past, future = _lengths(processor.config)
        channels = _channels(processor.config)
        windows: list[tuple[int, int]] = []
        for row, series in enumerate(rows.columns["series"]):
            if series.shape[1] != channels:
                raise DataError(
                    f"data.series: row {row} of {rows.where} has {series.shape[1]} channels, and "
                    f"the model takes {channels}"
                )
            length, first = len(series), past
            if data.held_out is not None:  # the future of test windows is behind the cut
                cut = length - max(future, round(data.held_out * length))
                length, first = (cut, past) if name == "train" else (length, max(cut, past))
            ends = range(length - future, first - 1, -future)
            windows += [(row, end) for end in sorted(ends)]
        if not windows:
            raise DataError(
                f"data.series: no series of {rows.where} has the {past + future} times of one "
                f"window ({past} before and {future} after); give longer ones, or a model of "
                "shorter windows (model.kwargs)"
            )
        limit = data.section.num_train if name == "train" else data.section.num_test
        if limit is not None and limit < len(windows):
            import torch

            chance = torch.Generator().manual_seed(data.seed)
            order = torch.randperm(len(windows), generator=chance)[:limit]
            windows = [windows[i] for i in sorted(order.tolist())]
        series = rows.columns["series"]
        return MadeSplit(len(windows), partial(_windows, series, windows, processor.config))

    def batch(
        self, rows: "TableRows", data: "OpenData", processor: Any, indices: Sequence[int]
    ) -> dict[str, Any]:
        """Not asked for: `split` has windows and no rows."""
        raise NotImplementedError

    def example(self, processor: Any, batch_size: int, num_tokens: int) -> dict[str, Any]:
        """A window of noise."""
        import numpy as np

        del num_tokens
        config = processor.config
        past, future = _lengths(config)
        chance = np.random.default_rng(0)
        noise = chance.normal(size=(past + future, _channels(config))).astype(np.float32)
        window = _windows([noise], [(0, past)] * batch_size, config, range(batch_size))
        if not config.is_encoder_decoder:
            del window["future_values"]
        return window

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, OfAll]":
        """In the units of the data; of a distribution, of its mean."""
        from sosp_hub.tasks.series import mean_absolute_error, root_mean_squared_error

        del info, processor
        return {
            "mean_absolute_error": mean_absolute_error,
            "root_mean_squared_error": root_mean_squared_error,
        }


def _lengths(config: Any) -> tuple[int, int]:
    """Times before and after; models that read lags need some more before."""
    lags = max(getattr(config, "lags_sequence", None) or [0])
    return config.context_length + lags, config.prediction_length


def _channels(config: Any) -> int:
    return getattr(config, "num_input_channels", None) or getattr(config, "input_size", None) or 1


def _windows(
    series: Sequence[Any],
    windows: Sequence[tuple[int, int]],
    config: Any,
    indices: Sequence[int],
) -> dict[str, Any]:
    """Times before and after the end of each window, as the model takes them."""
    import numpy as np
    import torch

    past, future = _lengths(config)
    chosen = [windows[i] for i in indices]
    before = torch.from_numpy(np.stack([series[row][end - past : end] for row, end in chosen]))
    after = torch.from_numpy(np.stack([series[row][end : end + future] for row, end in chosen]))
    if not config.is_encoder_decoder:
        return {"past_values": before, "future_values": after}
    if _channels(config) == 1:
        before, after = before.squeeze(-1), after.squeeze(-1)
    num = config.num_time_features
    ages = torch.arange(past + future).float().add(1).log().view(1, -1, 1)
    ages = ages.expand(len(chosen), -1, num).contiguous()
    return {
        "past_values": before,
        "past_time_features": ages[:, :past],
        "past_observed_mask": torch.ones_like(before),
        "future_values": after,
        "future_time_features": ages[:, past:],
    }
