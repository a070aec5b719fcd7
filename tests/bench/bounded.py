"""Work in a process of its own, with limits of time and memory, so that nothing of it can stop us.

A hang, a crash, a library that it patches, or a model larger than the machine stay in there.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]

_ASLEEP_S = 120
"""So long a process may wait for nothing; one that others keep from running does not wait."""


class TimeUpError(BaseException):
    """The process has had its processor time; nothing that the model does catches it."""


def in_own_process(
    name: str, work_on: Callable[[str], Record], limit_s: float, most_bytes: int
) -> Record:
    """Runs ``work_on(name)`` in a fork.

    Args:
        name: Of a model.
        work_on: Makes its record.
        limit_s: Seconds of processor time; what sleeps is stopped after two minutes.
        most_bytes: Memory that the process may hold, libraries included.

    Returns:
        The record, or one whose status says what ended it: time, memory, or crash.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_work, args=(name, work_on, limit_s, most_bytes, sender), daemon=True
    )
    process.start()
    sender.close()
    sent = b""
    asleep = 0
    with contextlib.suppress(EOFError):
        while not receiver.poll(1) and asleep < _ASLEEP_S:
            asleep = asleep + 1 if _sleeps(process.pid or 0) else 0
        if receiver.poll():
            sent = receiver.recv_bytes()
    receiver.close()
    process.join(10)  # it may hang when it ends, too
    is_over = not process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    if sent:
        return json.loads(sent)
    code = process.exitcode
    if not is_over or code in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"model": name, "status": "time", "message": f"not done after {limit_s:.0f} s"}
    return {"model": name, "status": "crash", "message": f"the process ended with {code}"}


def _work(
    name: str, work_on: Callable[[str], Record], limit_s: float, most_bytes: int, sender: Any
) -> None:
    os.setsid()
    torch.set_num_threads(1)
    signal.signal(signal.SIGXCPU, _time_up)  # the hard limit ends what does not come back to it
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s), int(limit_s) + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    start = time.process_time()
    try:
        record = work_on(name)
    except Exception as error:  # noqa: BLE001 - the benchmark is about failures
        record = {"model": name, "status": "build", "message": short(error, with_place=True)}
    except TimeUpError as error:
        record = {"model": name, "status": "time", "message": short(error, with_place=True)}
        record["message"] = f"not done after {limit_s:.0f} s{record['message']}"
    if wants_memory(record.get("message", "")):
        record["status"] = "memory"
    record["cpu_s"] = round(time.process_time() - start, 1)
    sender.send_bytes(json.dumps(record).encode())


def _time_up(*_: Any) -> None:
    raise TimeUpError


def _sleeps(pid: int) -> bool:
    """Whether a process waits for something other than a processor."""
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state in "SDT"


def wants_memory(message: str) -> bool:
    """Whether an error says that there was no memory left."""
    return any(word in message for word in ("can't allocate memory", "MemoryError", "bad_alloc"))


def short(error: BaseException, *, with_place: bool = False) -> str:
    """One line about an error, with the innermost places of the package and of the model's code."""
    text = f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
    if with_place:
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        text += " @ " + " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)
    return text
