"""How much memory something took at its height."""

import ctypes
import gc
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

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
    except (OSError, TypeError):  # neither /proc nor, on Windows, a library without a name
        return None


def _status(key: str) -> int:
    (kilobytes,) = re.findall(rf"^{key}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(kilobytes) * 1024


@torch.no_grad()
def forward_peak(model: nn.Module, inputs: Any) -> int:
    """Bytes in tensors at the height of one forward pass: weights, inputs and all in between.

    On an accelerator its allocator tells; on a CPU the allocations and releases that torch's
    profiler records are summed, so that the same model and inputs give the same number.

    Args:
        model: In the mode to be measured, on the device of ``inputs``.
        inputs: A tuple of positional tensors or a dict of keyword ones.
    """
    positional, named = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    given = [value for value in (*positional, *named.values()) if isinstance(value, Tensor)]
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers(), *given)
    }
    model(*positional, **named)  # what is made once and kept is not counted
    if torch.accelerator.is_available():
        peak = PeakMemory()
        model(*positional, **named)
        torch.accelerator.synchronize()
        return sum(held.values()) + (peak.grown_bytes() or 0)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports missing GPUs as errors
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = model(*positional, **named)
    del result
    records: Any = seen.profiler
    sizes = [
        (event.start_ns(), event.nbytes())
        for event in records.kineto_results.events()
        if event.name() == "[memory]"
    ]
    live = highest = 0
    for _, size in sorted(sizes, key=lambda each: each[0]):
        live += size
        highest = max(highest, live)
    return sum(held.values()) + highest
