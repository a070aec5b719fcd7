"""What a card may say: sentences and table rows made from a report, and from nothing else.

A value that was not measured has no row. Card and static page are two templates over these facts.
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sosp_hub.errors import without_secrets
from sosp_hub.recipe.metrics import Drop, is_share
from sosp_hub.recipe.tasks import known_task
from sosp_hub.report import numbers
from sosp_hub.report.grid import Grid
from sosp_hub.report.listing import RECIPE
from sosp_hub.report.schema import check_report
from sosp_hub.types import TABLE_SUFFIXES
from sosp_hub.untrusted import MOST_YAML_BYTES, UnreadableError, parse_yaml, read_text

STAGES = (
    ("dense", "dense"),
    ("control", "as long without masks"),
    ("cut", "after the cut"),
    ("rebuilt", "rebuilt"),
    ("recalibrated", "norms re-estimated"),
    ("final", "final"),
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~])(?:~|\$\w+)?/(?:[\w.@+-]+/)+([\w.@+-]+)")
_MOST_CLASSES = 10
UNNAMED = "its dense base model"


@dataclass(frozen=True)
class Facts:
    """All that the templates print.

    Attributes:
        smaller: What became smaller than what; the name of the base model follows.
        base_name: The dense model: a hub id, or the last part of another name; None = no name.
        outcome: What it cost, after the name of the base model.
        costs: Rows about size and speed.
        metrics: A row for each metric: its value at each stage that was measured.
        removed: For each kind of structure: how many of how many remain, in how many groups.
        masks: How much went in a training with masks; empty where there was none.
        compared: What the metrics are compared with; empty = nothing was measured.
        made_up: What was done to the kept weights to make up for the cut, before any training.
        floors: Groups where the floor stopped the cut.
        worse: Sentences about what got worse.
        drops: Classes that lost most: class, before, after, change.
        promise: What was promised, and what was measured of it.
        curve: The models that were tried for that.
        rounds: A row for each cut before the last.
        unmeasured: What a reader may look for and was not measured.
        versions: Package and version.
        base_model: Hub id of the base model; None where there is none.
        inexact: Number of cut groups that a mask can only approximate.
        trained_here: How a run made the dense model; empty where none did.
        local_base: The dense weights came from a folder, so that nobody else can name them.
    """

    smaller: str
    base_name: str | None
    outcome: str
    costs: Grid
    metrics: Grid
    removed: tuple[str, ...]
    made_up: tuple[str, ...]
    masks: str
    compared: str
    floors: tuple[str, ...]
    inexact: int
    worse: tuple[str, ...]
    drops: Grid
    promise: tuple[str, ...]
    curve: Grid
    rounds: Grid
    unmeasured: tuple[str, ...]
    versions: Mapping[str, str]
    base_model: str | None
    base_revision: str | None
    task: str | None
    data_id: str | None
    data_words: str
    test_split: str | None
    command: str
    recipe: str
    trained_here: str
    local_base: bool

    @property
    def headline(self) -> str:
        """One sentence: what became smaller, and what it cost."""
        return f"{self.smaller}{self.base_name or UNNAMED}{self.outcome}"


def collect(report: Mapping[str, Any]) -> Facts:
    """Everything a card says, from a report whose keys may be missing.

    Raises:
        HubError: Values of other kinds than a run writes.
    """
    check_report(report)
    base = report.get("base") or {}
    recipe_text = str(report.get("recipe") or "")
    recipe = read_recipe(recipe_text)
    data, model = recipe.get("data") or {}, recipe.get("model") or {}
    metrics = report.get("metrics") or {}
    cost = report.get("cost") or {}
    groups = report.get("groups") or []
    base_model = hub_id(base.get("model"))
    task = report.get("task") or model.get("task")
    provenance = (report.get("plan") or {}).get("provenance") or {}
    known = known_task(task)
    unit = f"test {known.counted if known else 'samples'}"
    latency = report.get("latency") or {}
    return Facts(
        smaller=_smaller(cost),
        base_name=_base_name(base),
        outcome=_outcome(metrics, unit),
        costs=_costs(
            cost, latency, report.get("peak_memory") or {}, known.counted if known else ""
        ),
        metrics=_metrics(metrics, (report.get("calibration") or {}).get("seen") or ()),
        removed=(*_removed(groups), *_blocks(provenance.get("blocks") or ())),
        made_up=(*_made_up(provenance), *_rebuilt(report.get("rebuild") or {})),
        masks=_masks(provenance.get("masks") or {}),
        compared=compared_with(metrics)[1] if compared_with(metrics)[0] else "",
        floors=tuple(provenance.get("floors") or ()),
        inexact=sum(
            not group.get("exact", True) and group["kept"] < group["size"] for group in groups
        ),
        worse=tuple(_what_got_worse(metrics, latency, unit)),
        drops=_drops(metrics),
        promise=tuple(_promise(report)),
        curve=_curve(report.get("promise") or {}),
        rounds=_rounds(report.get("rounds") or ()),
        unmeasured=_unmeasured(report),
        versions={str(k): str(v) for k, v in (report.get("versions") or {}).items()},
        base_model=base_model,
        base_revision=base.get("revision") if base_model else None,
        task=task,
        data_id=hub_id(data.get("id")) if not data.get("path") else None,
        data_words=_data_words(data, report.get("calibration") or {}),
        test_split=_test_split(data, (report.get("calibration") or {}).get("seed"))
        if data
        else None,
        command=scrub(str(report.get("command") or "")),
        recipe=scrub(recipe_text).strip(),
        trained_here=_trained_here(model, report),
        local_base=is_path(str(base.get("model") or model.get("id") or "")),
    )


def _trained_here(model: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    masks = ((report.get("plan") or {}).get("provenance") or {}).get("masks")
    again = (report.get("base") or {}).get("cut_again")
    run = "the run that scored it" if again else "the same run"
    if model.get("pretrained") is False and (model.get("train") or not masks):
        return f"The dense model was trained from random weights in {run}."
    if trained_before(report):
        data = "the data of its calibration" if again else "the same data"
        return f"The dense model was first trained on {data}, in {run}."
    return ""


def trained_before(report: Mapping[str, Any]) -> bool:
    """Whether a run trained the dense model before it was scored, also where it is cut again."""
    trained = (report.get("base") or {}).get("trained")
    return "dense" in (report.get("timings_s") or {}) or bool(trained)


def scored_by(report: Mapping[str, Any]) -> str | None:
    """The criterion of a run: what is meant where its recipe names none, whatever it is today."""
    return (report.get("criterion") or {}).get("name")


def own_recipe(folder: Path, published: str) -> str:
    """The text of a run's recipe: the private file with all paths, where it is of this report."""
    try:
        private = read_text(folder / RECIPE, MOST_YAML_BYTES)
    except UnreadableError:  # a folder that was published, or made before there was such a file
        return published
    return private if scrub(private) == published else published


def scrub(text: str) -> str:
    """The text without access tokens and without the folders of the machine it was written on.

    >>> scrub("prune /home/me/recipes/a.yaml --token hf_abcdefghij123")
    'prune .../a.yaml --token [token removed]'
    """
    return _ABSOLUTE_PATH.sub(r".../\1", without_secrets(text))


def hub_id(name: object) -> str | None:
    """The name if it can be a ``namespace/name`` of the hub: no folder, no data in the box."""
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        return None
    return None if name.startswith("sklearn/") or _is_here(name) else name


def is_path(name: str) -> bool:
    """Whether the name can only be a folder or file of the machine it was written on."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or _is_here(name)


def _is_here(name: str) -> bool:
    """Whether there is such a file or folder; what cannot be a path is none."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def own_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the metrics over all samples of the data that the recipe names first."""
    return [name for name in overall_metrics(metrics) if "@" not in name]


def overall_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the metrics over all samples, in the order they were measured."""
    names: dict[str, None] = {}
    for stage, _ in STAGES:
        for name, metric in (metrics.get(stage) or {}).items():
            if isinstance(metric, Mapping) and "value" in metric and "/" not in name:
                names[name] = None
    return list(names)


def compared_with(metrics: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """What the result is compared with, and its name: a control where there is one, else dense."""
    if metrics.get("control"):
        return metrics["control"], "trained as long without masks"
    return metrics.get("dense") or {}, "dense"


def with_spread(name: str, metric: Mapping[str, Any]) -> str:
    """The value with its standard error, where one was measured."""
    return numbers.metric_value(name, metric["value"], metric.get("stderr"))


def _smaller(cost: Mapping[str, Any]) -> str:
    parts = []
    before, after = cost.get("before") or {}, cost.get("after") or {}
    for key, words in (("params", "parameters"), ("macs", "multiply-accumulates")):
        if before.get(key) and after.get(key) is not None:
            change = after[key] / before[key] - 1
            more = "fewer" if change <= 0 else "more"
            parts.append(f"{numbers.share(abs(change))} {more} {words}")
    return f"{' and '.join(parts)} than " if parts else "A pruned version of "


def _outcome(metrics: Mapping[str, Any], unit: str) -> str:
    names = overall_metrics(metrics)
    (dense, label), final = compared_with(metrics), metrics.get("final") or {}
    if not names or names[0] not in final:
        return "; its quality was not measured."
    name = names[0]
    shown = numbers.metric_value(name, final[name]["value"])
    words = f"; {numbers.metric_name(name)} {shown}"
    if name not in dense:
        return f"{words}, with no measurement of the dense model to compare with."
    verdict = _verdict(dense[name], final[name], unit)
    return f"{words}, from {numbers.metric_value(name, dense[name]['value'])} {label} ({verdict})."


def _verdict(dense: Mapping[str, Any], final: Mapping[str, Any], unit: str) -> str:
    n = final.get("n")
    samples = f"{n:,} {unit.removesuffix('s') if n == 1 else unit}" if n else f"the {unit}"
    if dense["value"] == final["value"]:
        return f"the same on {samples}"
    if dense.get("stderr") is None or final.get("stderr") is None:
        return "no spread was measured"
    spread = 1.96 * math.hypot(dense["stderr"], final["stderr"])
    if abs(final["value"] - dense["value"]) <= spread:
        return f"a difference that two draws of {samples} may make"
    return f"a difference beyond what two draws of {samples} make"


def _costs(
    cost: Mapping[str, Any], latency: Mapping[str, Any], memory: Mapping[str, Any], counted: str
) -> Grid:
    before, after = cost.get("before") or {}, cost.get("after") or {}
    size = f" ({scrub(str(cost['of_one']))})" if cost.get("of_one") else ""
    rows = [
        (words, show(before[key]), show(after[key]), numbers.change(before[key], after[key]))
        for key, words, show in (
            ("params", "Parameters", numbers.count),
            ("macs", f"Multiply-accumulates of one input{size}", numbers.count),
            ("bytes", "Weights", numbers.size),
        )
        if before.get(key) and after.get(key) is not None
    ]
    if counted == "tokens" and cost.get("tokens") and before.get("macs") and after.get("macs"):
        one, two = (each["macs"] / cost["tokens"] for each in (before, after))
        words = f"Multiply-accumulates per token (mean of {cost['tokens']})"
        row = (words, numbers.count(one), numbers.count(two), numbers.change(one, two))
        rows.insert(2, row)
    decode = latency.get("decode") or {}
    for measured, words, key, show in (
        (latency, _pass_words(latency, decode), "seconds", numbers.seconds),
        (decode, "Latency of decode, one token after that prompt", "seconds", numbers.seconds),
        (memory, _memory_words(memory), "bytes", numbers.size),
    ):
        pair = [(measured.get(when) or {}).get(key) for when in ("before", "after")]
        if pair[0] and pair[1]:
            rows.append((words, show(pair[0]), show(pair[1]), numbers.change(pair[0], pair[1])))
    speed = _speed_note(latency) if rows else ""
    notes = [
        f"Latency was measured on: {speed}." if speed else "",
        _latency_spread("pass", latency),
        _latency_spread("token", decode),
    ]
    note = " ".join(filter(None, notes))
    return Grid("Size and speed", ("", "dense", "this model", "change"), tuple(rows), note)


def _pass_words(latency: Mapping[str, Any], decode: Mapping[str, Any]) -> str:
    """What the first latency is of: where decoding was measured too, it is prefill."""
    length = (latency.get("after") or {}).get("length")
    if not decode or not length:
        return "Latency of one forward pass"
    return f"Latency of prefill, a prompt of {length} tokens"


def _memory_words(memory: Mapping[str, Any]) -> str:
    """What the peak is of; weights and inputs are in it."""
    after = memory.get("after") or {}
    words = ["Peak memory of one forward pass"]
    if after.get("batch"):
        words.append(f"batch of {after['batch']}")
    if after.get("length"):
        words.append(f"{after['length']} tokens")
    if after.get("dtype"):
        words.append(str(after["dtype"]).removeprefix("torch."))
    return ", ".join(words)


NO_SPREAD = "One sample has no standard error"


def _metrics(metrics: Mapping[str, Mapping[str, Any]], seen: Sequence[str]) -> Grid:
    stages = [(stage, label) for stage, label in STAGES if metrics.get(stage)]
    rows = []
    for name in overall_metrics(metrics):
        of_stages = [metrics[stage].get(name) for stage, _ in stages]
        samples = sorted({f"{m['n']:,}" for m in of_stages if m and m.get("n")})
        values = [with_spread(name, m) if m else "" for m in of_stages]
        words = numbers.metric_name(name) + _domain(name, seen)
        rows.append((words, *values, " / ".join(samples)))
    head = ("metric", *(label for _, label in stages), "samples")
    spread = any("±" in cell for row in rows for cell in row)
    error = "± is one standard error over the samples" if spread else NO_SPREAD
    note = f"{error}. One run with one seed."
    return Grid("Quality", head, tuple(rows), note)


def _domain(metric: str, seen: Sequence[str]) -> str:
    """Whether calibration has seen the kind of samples of a metric of another data set."""
    _, _, other = metric.partition("@")
    if not other:
        return ""
    return " (calibrated on)" if other in seen else " (out of the calibration's domain)"


def _removed(groups: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for kind in dict.fromkeys(group["kind"] for group in groups):
        members = [group for group in groups if group["kind"] == kind]
        kept, size = (sum(group[key] for group in members) for key in ("kept", "size"))
        whole = sum(group["kept"] == group["size"] for group in members)
        untouched = f", {whole} of them whole" if 0 < whole < len(members) else ""
        name = {"kv_group": "KV groups", "residual": "residual channels"}.get(kind, f"{kind}s")
        number = "one group" if len(members) == 1 else f"{len(members)} groups"
        remain = f"all {size:,}" if kept == size else f"{kept:,} of {size:,}"
        yield f"{name.replace('_', ' ')}: {remain} remain, in {number}{untouched}"


def _blocks(gone: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    if gone:
        named = [
            (one["layer"] if one["kind"] == "layer" else f"the {one['kind']} of {one['layer']}")
            + f" (loss then {one['loss']:.4g})"
            for one in gone
        ]
        yield f"whole blocks, by measured loss on calibration samples: {', '.join(named)}"


def _made_up(provenance: Mapping[str, Any]) -> Iterable[str]:
    if compensation := provenance.get("compensation"):
        yield (
            f"gates of {compensation['groups']} groups, {compensation['least_gate']:.2f} to "
            f"{compensation['largest_gate']:.2f}, are folded into the kept weights and make up "
            f"for the cut (closed form, damping {compensation['damping']:g})"
        )
        steps = compensation.get("steps") or [{}]
        if num := len(steps) - 1:
            first, last = steps[0]["divergence"], steps[-1]["divergence"]
            yield (
                f"{num} step{'s' * (num != 1)} moved these gates on: divergence from the dense "
                f"model on held-out calibration samples {first:.3g} to {last:.3g}"
            )
    if num := provenance.get("shifted_biases"):
        yield f"{num} biases are shifted by the mean of what was cut"


def _rebuilt(told: Mapping[str, Any]) -> Iterable[str]:
    layers, left = told.get("layers") or [], told.get("left") or {}
    if layers:
        errors = [
            numbers.share(statistics.median(layer[key] for layer in layers))
            for key in ("error_cut", "error")
        ]
        dampings = sorted({layer["damping"] for layer in layers})
        words = f"{dampings[0]:g}" + f" to {dampings[-1]:g}" * (len(dampings) > 1)
        took = [f"{told['num_samples']:,} calibration samples"] if told.get("num_samples") else []
        if told.get("seconds"):
            took.append(numbers.seconds(told["seconds"]))
        if told.get("peak_bytes"):
            took.append(f"{numbers.size(told['peak_bytes'])} of memory at the most")
        yield (
            f"{len(layers)} weight{'s' * (len(layers) != 1)} that read what was cut: solved again "
            f"by least squares toward the uncut output, whose squared error fell from {errors[0]} "
            f"to {errors[1]} in the median (damping {words}; {', '.join(took)})"
        )
    if blocks := told.get("blocks"):
        errors = [
            numbers.share(statistics.median(block[key] for block in blocks))
            for key in ("error_before", "error")
        ]
        yield (
            f"{len(blocks)} block{'s' * (len(blocks) != 1)} trained toward the uncut output: the "
            f"squared error on held-out calibration samples fell from {errors[0]} to {errors[1]} "
            "in the median"
        )
    scarce = [layer for layer in layers if layer["rows"] < layer["inputs"]]
    if scarce:
        worst = min(scarce, key=lambda layer: layer["rows"] / layer["inputs"])
        yield (
            f"{len(scarce)} of them had fewer calibration rows than inputs, the worst "
            f"{worst['rows']:,} for {worst['inputs']:,}"
        )
    if left:
        name = next(iter(left))
        yield (
            f"{len(left)} other weight{'s' * (len(left) != 1)} that read what was cut stayed as "
            f"{'it was' if len(left) == 1 else 'they were'}, such as {name} ({left[name]})"
        )


def _promise(report: Mapping[str, Any]) -> Iterable[str]:
    """What may be lost, and what the cut and the final model lose of it."""
    promise = report.get("promise") or {}
    curve, chosen = promise.get("curve") or [], promise.get("chosen")
    if not all(promise.get(key) for key in ("max_drop", "confidence", "num_proof")):
        return
    if chosen is None or chosen >= len(curve):
        return
    drops = {drop["metric"]: Drop(**drop) for drop in promise["max_drop"]}
    asked = " and ".join(drop.words() for drop in drops.values())
    confidence = numbers.share(promise["confidence"], 0)
    yield (
        f"Promised: compared with the dense model at most {asked} worse, with {confidence} "
        f"confidence, measured on {numbers.whole(promise['num_proof'])} training samples that "
        "nothing was trained, scored or rebuilt with and that guided no choice"
    )
    after = (report.get("recovery") or {}).get("promise")
    stages = [("after the cut", curve[chosen]["proof"])]
    if after:
        name = "after fine-tuning, which was undone because of that" if after["undone"] else "final"
        stages.append((name, after["lost"]))
    for name, lost in stages:
        parts = (
            f"{numbers.metric_name(metric)} {_loss_words(drops[metric], one)}"
            for metric, one in lost.items()
            if metric in drops
        )
        yield f"Measured {name}: {'; '.join(parts)}"


def _curve(promise: Mapping[str, Any]) -> Grid:
    """The models that were tried, from the largest to the smallest."""
    drops = {drop["metric"]: Drop(**drop) for drop in promise.get("max_drop") or ()}
    rows = []
    curve: Sequence[Mapping[str, Any]] = promise.get("curve") or []
    for number, tried in enumerate(curve):
        shares = _shares(tried["cost"])
        proof = tried["proof"]
        lost = [_loss_words(drops[metric], proof[metric]) for metric in drops if metric in proof]
        chosen = "chosen" if number == promise.get("chosen") else ""
        within = "yes" if all(one["holds"] for one in proof.values()) else "no"
        rows.append((*shares, *lost, within, chosen))
    head = ("MACs", "parameters", *(f"{numbers.metric_name(m)} lost" for m in drops), "within", "")
    note = "Lost: compared with the dense model, on the held-out samples of the proof."
    return Grid("What was tried", head, tuple(rows), note, num_left=0)


def _shares(cost: Mapping[str, Any]) -> list[str]:
    """What is kept of multiply-accumulates and parameters."""
    given = [cost.get(key) for key in ("macs", "params")]
    return ["" if share is None else numbers.share(share) for share in given]


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> Grid:
    """What was kept and measured after each cut before the last."""
    names = overall_metrics(rounds[0]["metrics"]) if rounds else []
    rows = []
    for number, one in enumerate(rounds, start=1):
        kept, metrics = _shares(one["kept"]), one["metrics"]
        last = next(reversed([*metrics.values()]), None)
        stages = [metrics.get("cut") or {}, last or {}]
        values = [
            with_spread(name, stage[name]) if name in stage else ""
            for name in names
            for stage in stages
        ]
        rows.append((str(number), *kept, *values))
    measured = [f"{numbers.metric_name(n)}, {w}" for n in names for w in ("cut", "trained")]
    head = ("round", "MACs", "parameters", *measured)
    return Grid("Rounds before the last", head, tuple(rows))


def _loss_words(drop: Drop, lost: Mapping[str, Any]) -> str:
    percent = drop.relative or is_share(drop.metric)
    value, upper = (100 * lost[key] if percent else lost[key] for key in ("value", "upper"))
    unit = " %" if drop.relative else " points" if percent else ""
    return f"{value:.3g}{unit} (at most {upper:.3g})".replace("-", numbers.MINUS)


def _masks(masks: Mapping[str, Any]) -> str:
    """How much went by itself in a training with masks."""
    if not masks:
        return ""
    kept = numbers.share(masks["shares"]["macs"])
    steps = f"{masks['num_penalized']:,} of {masks['num_steps']:,} steps"
    return (
        f"Masks were trained with the model, with a sparsity penalty of {masks['sparsity']:.2g} in "
        f"{steps}: {masks['num_off']:,} channels are silent, which leaves {kept} of the "
        "multiply-accumulates."
    )


def _what_got_worse(
    metrics: Mapping[str, Any], latency: Mapping[str, Any], unit: str
) -> Iterable[str]:
    (dense, _), final = compared_with(metrics), metrics.get("final") or {}
    for name in overall_metrics(metrics):
        if name not in dense or name not in final:
            continue
        pair = dense[name]["value"], final[name]["value"]
        if (pair[1] > pair[0]) if numbers.lower_is_better(name) else (pair[1] < pair[0]):
            arrow = " → ".join(numbers.metric_value(name, value) for value in pair)
            verdict = _verdict(dense[name], final[name], unit)
            change = numbers.metric_change(name, *pair)
            yield f"{numbers.metric_name(name)}: {arrow} ({change}; {verdict})"
    pair = [(latency.get(when) or {}).get("seconds") for when in ("before", "after")]
    if pair[0] and pair[1] and pair[1] > pair[0]:
        arrow = f"{numbers.seconds(pair[0])} → {numbers.seconds(pair[1])}"
        yield f"latency: {arrow}, slower although it is smaller"


def _drops(metrics: Mapping[str, Any]) -> Grid:
    """Classes whose accuracy fell, the most first."""
    before, after = (
        _per_class(stage) for stage in (compared_with(metrics)[0], metrics.get("final") or {})
    )
    lost = sorted((after[c][0] - before[c][0], c) for c in before.keys() & after.keys())
    pairs = [(c, before[c], after[c]) for difference, c in lost[:_MOST_CLASSES] if difference < 0]
    rows = tuple(
        (c, _class_value(one), _class_value(other), numbers.points(one[0], other[0]))
        for c, one, other in pairs
    )
    return Grid("Classes that lost most", ("class", "dense", "this model", "change"), rows)


def _per_class(stage: Mapping[str, Any]) -> dict[str, tuple[float, int | None]]:
    return {
        name.partition("/")[2]: (metric["value"], metric.get("n"))
        for name, metric in stage.items()
        if name.startswith("accuracy/")
    }


def _class_value(value: tuple[float, int | None]) -> str:
    share, n = value
    return numbers.share(share) + (f" (n = {n})" if n else "")


def _unmeasured(report: Mapping[str, Any]) -> tuple[str, ...]:
    metrics = report.get("metrics") or {}
    absent = []
    if not metrics.get("final"):
        absent.append("quality of this model")
    if not compared_with(metrics)[0]:
        absent.append("quality of the dense model")
    if not (report.get("latency") or {}).get("after"):
        absent.append("latency")
    if not (report.get("peak_memory") or {}).get("after"):
        absent.append("peak memory")
    if metrics.get("final") and not _per_class(metrics["final"]):
        absent.append("quality by class or by kind of text")
    absent.append("robustness, bias, and any data other than the test split above")
    return tuple(absent)


def _latency_spread(one: str, measured: Mapping[str, Any]) -> str:
    """Between which times the middle half lies, dense and cut taking turns."""
    both = [measured.get(when) or {} for when in ("before", "after")]
    if not all(each.get("quartiles") and each.get("passes") for each in both):
        return ""
    dense, cut = (" to ".join(map(numbers.seconds, each["quartiles"])) for each in both)
    return (
        f"The middle half of {both[1]['passes']} times, in turn, was {dense} a {one} (dense) and "
        f"{cut} (this model)."
    )


def _speed_note(latency: Mapping[str, Any]) -> str:
    after = latency.get("after") or {}
    words = []
    if after.get("hardware"):
        words.append(scrub(str(after["hardware"])))
    if after.get("threads"):
        words.append(f"{after['threads']} thread{'s' if after['threads'] != 1 else ''}")
    if after.get("batch"):
        words.append(f"batch of {after['batch']}")
    if after.get("length"):
        words.append(f"{after['length']} tokens")
    if after.get("of_one"):
        words.append(scrub(str(after["of_one"])))
    if after.get("dtype"):
        words.append(str(after["dtype"]).removeprefix("torch."))
    return ", ".join(words)


def _base_name(base: Mapping[str, Any]) -> str | None:
    name = base.get("model") or base.get("architecture")
    if not name:
        return None
    return hub_id(name) or Path(str(name)).name


def _test_split(data: Mapping[str, Any], seed: int | None) -> str:
    """Its name, or how it was held out: a file alone has no splits."""
    split = data.get("test", "test")
    if split is not None and Path(str(data.get("path") or "")).suffix not in TABLE_SUFFIXES:
        return str(split)
    given = data.get("validation_share")
    part = given if isinstance(given, float) and 0 < given < 1 else 0.2
    words = f"held-out {numbers.share(part, 0)} of {data.get('train', 'train')}"
    return words if seed is None else f"{words}, seed {seed}"


def _data_words(data: Mapping[str, Any], calibration: Mapping[str, Any]) -> str:
    if data.get("path"):
        local = f"local files {Path(str(data['path'])).name}"
        return f"{data['id']} ({local})" if data.get("id") else local
    return scrub(str(data.get("id") or calibration.get("data") or ""))


def read_recipe(text: str) -> dict[str, Any]:
    """The recipe in a report, as it was written; empty where it cannot be read."""
    try:
        recipe = parse_yaml(text)
    except UnreadableError:
        return {}
    if not isinstance(recipe, dict):
        return {}
    return {key: value for key, value in recipe.items() if isinstance(value, dict)}
