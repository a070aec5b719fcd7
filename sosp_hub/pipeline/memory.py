"""How much memory something took at its height."""

import ctypes
import gc
import re
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak from its making on, above what the process held then.

    On an accelerator bytes in tensors; on Linux without one the resident set, which misses what
    the allocator had kept and counts what it keeps; elsewhere unknown.
    """

    def __init__(self) -> None:
        gc.collect()
        self._device = torch.accelerator.is_available()
        if self._device:
            torch.accelerator.reset_peak_memory_stats()
        self._before = torch.accelerator.memory_allocated() if self._device else _resident()

    def grown_bytes(self) -> int | None:
        """The peak so far; None where it cannot be known."""
        if self._before is None:
            return None
        peak = torch.accelerator.max_memory_allocated() if self._device else _status("VmHWM")
        return max(0, peak - self._before)


def _resident() -> int | None:
    """What the process holds now, from where its peak is counted anew."""
    try:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # glibc gives back what is free, or the peak would hide in it
            trim(0)
        _CLEAR.write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(key: str) -> int:
    (kilobytes,) = re.findall(rf"^{key}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(kilobytes) * 1024
