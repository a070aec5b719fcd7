"""Audio that is read when it is needed: WAV in the box, other formats where soundfile is there."""

import io
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jaxtyping import Float32

from sosp_hub.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Wave = Float32[np.ndarray, " times"]


@dataclass(frozen=True, eq=False)
class AudioColumn:
    """A column of audio.

    Attributes:
        table: With the column alone: paths, files' bytes, or arrays with their rate.
        column: Its name.
        positions: Rows, in the order of the samples.
        where: The source, for messages.
    """

    table: Any
    column: str
    positions: Sequence[int]
    where: str

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, indices: Sequence[int]) -> Self:
        """These samples, in this order."""
        positions = [self.positions[i] for i in indices]
        return type(self)(self.table, self.column, positions, self.where)

    def read(self, index: int, rate: int) -> Wave:
        """One channel, from -1 to 1.

        Args:
            index: Of the sample.
            rate: Values a second that the model takes.

        Raises:
            DataError: What cannot be read, or has another rate; names the row.
        """
        row = self.positions[index]
        value = self.table[row][self.column]
        try:
            values, own_rate = _decoded(value)
        except (OSError, EOFError, ValueError, KeyError, TypeError, wave.Error) as error:
            raise DataError(
                f"data.audio: row {row} of {self.where} cannot be read ({error}); expected a WAV "
                "file (others need pip install soundfile), its bytes, or an array with its "
                "sampling_rate"
            ) from error
        if own_rate != rate:
            raise DataError(
                f"data.audio: row {row} of {self.where} has {own_rate} values a second, and the "
                f"model takes {rate}, so pitch and speed would be wrong. Write the data after "
                f"dataset.cast_column({self.column!r}, datasets.Audio(sampling_rate={rate}))"
            )
        if not len(values) or not np.isfinite(values).all():
            raise DataError(f"data.audio: row {row} of {self.where} is empty or not finite")
        return values


def audio_column(table: "Dataset", column: str, where: str) -> AudioColumn:
    """The audio of a table; nothing is read yet."""
    from datasets import Audio

    if isinstance(table.features[column], Audio):
        table = table.cast_column(column, Audio(decode=False))
    return AudioColumn(table.select_columns([column]), column, range(len(table)), where)


def _decoded(value: Any) -> tuple[Wave, int]:
    if isinstance(value, dict) and value.get("array") is not None:
        return _of_array(value["array"]), int(value["sampling_rate"])
    if isinstance(value, dict):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]
    if not isinstance(value, str | io.BytesIO):
        raise ValueError(f"it is a {type(value).__name__}")
    source: Any = Path(value).expanduser() if isinstance(value, str) else value
    try:
        import soundfile  # pyright: ignore[reportMissingImports]
    except ImportError:
        return _wave(source)
    values, rate = soundfile.read(source, dtype="float32", always_2d=True)
    return values.mean(1), rate


def _of_array(given: Any) -> Wave:
    """Values as they are; what is several channels or not between -1 and 1 is not guessed at."""
    values = np.asarray(given, np.float32)
    if values.ndim != 1:
        raise ValueError(f"its array has the shape {list(values.shape)}; write one channel")
    if values.size and np.abs(values).max() > 1 and (values == values.round()).all():
        raise ValueError("its array holds whole numbers; divide those of 16 bits by 32768")
    return values


def _wave(source: Any) -> tuple[Wave, int]:
    """A WAV file of whole numbers, by the standard library."""
    with wave.open(str(source) if isinstance(source, Path) else source, "rb") as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        data = file.readframes(file.getnframes())
    if width not in (1, 2, 4):
        raise ValueError(f"its values have {8 * width} bits; write them with 16")
    kind = {1: np.uint8, 2: np.dtype("<i2"), 4: np.dtype("<i4")}[width]
    values = np.frombuffer(data, kind).astype(np.float32)
    values = (values - 128) / 128 if width == 1 else values / float(2 ** (8 * width - 1))
    return values.reshape(-1, channels).mean(1), rate
