"""What a report may hold, as far as anything is made of it: checked before it is read.

Every key may be missing, and others may be there. Nothing is converted.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sosp_hub.errors import HubError, shortened
from sosp_hub.report.listing import REPORT
from sosp_hub.untrusted import UnreadableError, read_json

Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(ge=1, lt=2**63)]
Amount = Annotated[float, Field(ge=0)]
_MOST_FAULTS = 5


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", arbitrary_types_allowed=True)


class _Metric(_Part):
    value: float
    n: Count | None = None
    stderr: Amount | None = None


class _Cost(_Part):
    macs: Amount | None = None
    params: Amount | None = None
    bytes: Amount | None = None


class _Measured(_Part):
    seconds: Amount | None = None
    quartiles: Annotated[list[Amount], Field(min_length=2, max_length=2)] | None = None
    passes: Count | None = None
    bytes: Amount | None = None
    batch: Count | None = None
    length: Count | None = None
    of_one: str | None = None
    threads: Count | None = None
    dtype: str | None = None
    hardware: str | None = None


class _Costs(_Part):
    before: _Cost | None = None
    after: _Cost | None = None
    of_one: str | None = None
    tokens: Count | None = None


class _Measurements(_Part):
    before: _Measured | None = None
    after: _Measured | None = None


class _Latency(_Measurements):
    decode: _Measurements | None = None


class _Group(_Part):
    name: str
    kind: str
    size: Size
    kept: Count
    exact: bool = True


class _Step(_Part):
    divergence: float


class _Compensation(_Part):
    groups: Count
    least_gate: float
    largest_gate: float
    damping: float
    steps: list[_Step] | None = None


class _Shares(_Part):
    macs: Amount


class _Masks(_Part):
    sparsity: float
    num_steps: Count
    num_penalized: Count
    num_off: Count
    shares: _Shares


class _Block(_Part):
    kind: str
    layer: str
    loss: float


class _Provenance(_Part):
    blocks: list[_Block] | None = None
    floors: list[str] | dict[str, Any] | None = None
    compensation: _Compensation | None = None
    masks: _Masks | None = None
    shifted_biases: Count | None = None


class _Plan(_Part):
    kept: dict[str, list[Count] | tuple[Count, ...]] | None = None
    provenance: _Provenance | None = None


class _Criterion(_Part):
    name: str | None = None
    options: dict[str, Any] | None = None


class _Calibration(_Part):
    data: str | None = None
    num_samples: Count | None = None
    seed: Count | None = None
    seen: list[str] | None = None
    drawn_labels: Count | None = None


class _RebuiltLayer(_Part):
    tensor: str
    inputs: Count
    rows: Count
    damping: Amount
    error_cut: Amount
    error: Amount


class _RefinedBlock(_Part):
    name: str
    error_before: Amount
    error: Amount


class _Rebuild(_Part):
    layers: list[_RebuiltLayer] | None = None
    blocks: list[_RefinedBlock] | None = None
    left: dict[str, str] | None = None
    num_samples: Count | None = None
    seconds: Amount | None = None
    peak_bytes: Count | None = None


class _Base(_Part):
    model: str | None = None
    revision: str | None = None
    architecture: str | None = None
    weights: str | None = None
    trained: bool | None = None
    cut_again: bool | None = None
    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | list[str] | None = None
    pipeline_tag: str | None = None


class _Selected(_Part):
    epoch: float
    loss: float


_Pair = tuple[float, float] | Annotated[list[float], Field(min_length=2, max_length=2)]


class _Teacher(_Part):
    id: str | None = None
    distill: Amount = 0.0
    hidden: Amount = 0.0
    relations: Amount = 0.0
    top_k: Count | None = None


class _Recovery(_Part):
    selected: _Selected | None = None
    num_held_out: Count | None = None
    num_samples: Count | None = None
    num_tokens: Count | None = None
    teacher: _Teacher | None = None
    rates: tuple[_Pair, ...] | list[_Pair] | None = None
    promise: "_AfterTraining | None" = None


class _Lost(_Part):
    value: float
    upper: float
    holds: bool


class _Drop(_Part):
    metric: str
    amount: Amount
    relative: bool = False


class _Tried(_Part):
    cost: _Cost
    proof: dict[str, _Lost]


class _Promise(_Part):
    max_drop: list[_Drop] | None = None
    confidence: Amount | None = None
    num_proof: Count | None = None
    chosen: Count | None = None
    curve: list[_Tried] | None = None


class _AfterTraining(_Part):
    lost: dict[str, _Lost]
    undone: bool


class _Round(_Part):
    kept: _Cost
    metrics: dict[str, dict[str, _Metric] | None]


class _Report(_Part):
    plan: _Plan | None = None
    metrics: dict[str, dict[str, _Metric] | None] | None = None
    rebuild: _Rebuild | None = None
    cost: _Costs | None = None
    latency: _Latency | None = None
    peak_memory: _Measurements | None = None
    groups: list[_Group] | None = None
    criterion: _Criterion | None = None
    calibration: _Calibration | None = None
    base: _Base | None = None
    task: str | None = None
    versions: dict[str, str] | None = None
    recipe: str | None = None
    command: str | None = None
    history: list[Any] | None = None
    recovery: _Recovery | None = None
    promise: _Promise | None = None
    rounds: list[_Round] | None = None
    timings_s: dict[str, Any] | None = None


def check_report(report: Mapping[str, Any], source: str = "report") -> None:
    """Refuses a report whose values are of other kinds than anything that is made of them.

    Raises:
        HubError: With the first faults.
    """
    try:
        _Report.model_validate(dict(report))
    except ValidationError as error:
        faults = error.errors(include_url=False)
        lines = [
            f"  - {shortened('.'.join(map(str, fault['loc'])))}: {fault['msg']}, "
            f"not {shortened(repr(fault['input']))}"
            for fault in faults[:_MOST_FAULTS]
        ]
        lines += [f"  and {len(faults) - _MOST_FAULTS} more"] * (len(faults) > _MOST_FAULTS)
        raise HubError("\n".join([f"{source}: this is no report of a run", *lines])) from None


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report that a run left in its folder; None where there is none.

    Raises:
        HubError: A file that is no report.
    """
    path = folder / REPORT
    if not path.is_file():
        return None
    try:
        report = read_json(path)
    except UnreadableError as error:
        raise HubError(f"{path}: {error}") from error
    if not isinstance(report, dict):
        raise HubError(f"{path}: a {type(report).__name__}, expected the report of a run")
    check_report(report, str(path))
    return report
