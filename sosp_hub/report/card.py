"""The model card: what a run's report says, and nothing that it does not say.

The generated part stands between two markers. What a person writes outside of them stays, and so do
metadata that a person has set.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, Template
from pydantic import ValidationError

from sosp_hub.atomic import write_text
from sosp_hub.errors import HubError, without_secrets
from sosp_hub.recipe.criteria import CRITERIA, Method
from sosp_hub.recipe.tasks import known_task
from sosp_hub.report import numbers
from sosp_hub.report.facts import (
    UNNAMED,
    Facts,
    collect,
    own_metrics,
    scrub,
)
from sosp_hub.report.figures import Picture, write_figures
from sosp_hub.report.licence import copy_licence_files
from sosp_hub.report.markers import fence, split_card
from sosp_hub.report.markup import Markdown, block, code, markdown
from sosp_hub.report.schema import read_report
from sosp_hub.report.snippets import (
    Checkpoint,
    load_snippet,
    read_checkpoint,
    run_snippet,
    where_it_loads,
)

_INHERITED = ("license", "license_name", "license_link", "language")
_UNION = ("tags", "datasets", "metrics")


def render_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    report: Mapping[str, Any] | None = None,
    figures: bool = True,
    run: bool = True,
) -> Path:
    """Writes ``README.md`` and ``figures/`` into a model's folder, and the base's licence texts.

    Args:
        folder: A saved model with its ``sosp_report.json``.
        repo_id: Where it will be published; the load snippet names the folder until that is known.
        report: The report, where it is not in the folder.
        figures: Draw the figures as well.
        run: Run the load snippet on the folder first, so that the card shows lines that work
            (those of a model of no library need code that is not here, and are not run).

    Returns:
        Path of the card.

    Raises:
        HubError: A folder without a model or report, a snippet that fails, or broken markers.
    """
    folder = Path(folder)
    checkpoint = read_checkpoint(folder)
    if report is None:
        report = read_report(folder)
    if report is None:
        raise HubError(
            f"{folder}: there is no sosp_report.json, so a card has nothing to state; "
            "save it with sosp_hub.save_pretrained(model, folder, report=...), or write README.md "
            "yourself"
        )
    facts = collect(report)
    if run and checkpoint.can_run:
        run_snippet(load_snippet(checkpoint, str(folder.resolve()), facts.task))
    if facts.base_model:
        copy_licence_files(facts.base_model, folder, facts.base_revision)
    drawn = write_figures(report, folder) if figures else []
    path = folder / "README.md"
    old = path.read_text(encoding="utf-8") if path.is_file() else None
    text = card_text(checkpoint, report, facts, drawn, repo_id or folder.resolve().name, old)
    write_text(path, text)
    return path


def card_text(
    checkpoint: Checkpoint,
    report: Mapping[str, Any],
    facts: Facts,
    drawn: list[Picture],
    address: str,
    old: str | None = None,
) -> str:
    """The whole card; a person's own text and metadata in the ``old`` one survive."""
    before, after, kept = split_card(old)
    data = _merge(metadata(checkpoint, report, facts, address.rpartition("/")[2]), kept)
    criterion = report.get("criterion") or {}
    body = _template("card.md.jinja").render(
        title=address.rpartition("/")[2],
        facts=facts,
        base=_base(facts),
        notes=notes(facts, data),
        snippet=load_snippet(checkpoint, address, facts.task),
        where=Markdown(where_it_loads(checkpoint)),
        pictures=drawn,
        criterion=criterion,
        options=", ".join(
            f"{key}: {value if isinstance(value, str) else json.dumps(value)}"  # as in a recipe
            for key, value in _options(report).items()
        ),
        method=_method(criterion),
        recovery=_recovery(report),
        calibration=_calibration(report.get("calibration") or {}),
        has_report=(checkpoint.folder / "sosp_report.json").is_file(),
    )
    text = f"{before}{without_secrets(fence(body, address))}{after}"
    return str(ModelCard(f"---\n{without_secrets(data.to_yaml())}\n---\n{text}"))


def _options(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the order of the structures depends on, and what their scores were divided by."""
    criterion = report.get("criterion") or {}
    decided = ((report.get("plan") or {}).get("provenance") or {}).get("criterion") or {}
    per = {"per": decided["per"]} if isinstance(decided, dict) and decided.get("per") else {}
    return {**per, **(criterion.get("options") or {})}


def _method(criterion: Mapping[str, Any]) -> Method | None:
    """The criterion of a report in words; None for one that is not known here."""
    model = CRITERIA.get(criterion.get("name"))
    if model is None:
        return None
    given = criterion.get("options") or {}
    known = {key: value for key, value in given.items() if key in model.option_names()}
    try:
        return model.model_validate(known).method()
    except ValidationError:  # of an earlier version, or not ours
        return None


def metadata(
    checkpoint: Checkpoint, report: Mapping[str, Any], facts: Facts, model_name: str
) -> ModelCardData:
    """What the hub reads: only what the report or the base model's own card states."""
    base = report.get("base") or {}
    final = (report.get("metrics") or {}).get("final") or {}
    names = [name for name in own_metrics({"final": final}) if name != "loss"]
    known = known_task(facts.task)
    task = known.name if known else None
    tags = ["sosp_hub", "pruned", "structured-pruning"]
    if (report.get("criterion") or {}).get("name"):
        tags.append(str(report["criterion"]["name"]).replace("_", "-"))
    if checkpoint.library == "timm":
        tags.append("timm")
    results = [
        EvalResult(
            task_type=task,
            dataset_type=facts.data_id or facts.data_words,
            dataset_name=facts.data_words,
            dataset_split=facts.test_split,
            metric_type=name,
            metric_value=round(final[name]["value"], 6),
            metric_name=name.replace("_", " "),
        )
        for name in names
        if task and facts.data_words
    ]
    return ModelCardData(
        library_name=checkpoint.library_name,
        pipeline_tag=base.get("pipeline_tag") or task,
        base_model=facts.base_model,
        **({"base_model_relation": "finetune"} if facts.base_model else {}),
        **{key: base[key] for key in _INHERITED if base.get(key)},
        datasets=[facts.data_id] if facts.data_id else None,
        metrics=names or None,
        tags=tags,
        model_name=model_name if results else None,
        eval_results=results or None,
    )


def notes(facts: Facts, data: ModelCardData) -> list[str]:
    """What a reader has to be told because it is not known."""
    notes_of_run = []
    if data.get("license") is None:
        reason = (
            "no card of its base model was found that names one"
            if facts.base_model
            else "no licence was set"
        )
        notes_of_run.append(
            f"The licence of this model is unknown: {reason}. "
            "Set `license:` at the top of this file."
        )
    if facts.local_base and data.get("base_model") is None:
        notes_of_run.append(
            "The base model was loaded from a local folder, so it is not named. "
            "If it is on the hub, set `base_model: NAMESPACE/NAME` at the top of this file."
        )
    return notes_of_run


def _base(facts: Facts) -> str:
    """The base model in a sentence: a link where it is on the hub."""
    if facts.base_model:
        address = f"https://huggingface.co/{facts.base_model}"
        return Markdown(f"[{facts.base_model}]({address})")
    return code(facts.base_name) if facts.base_name else UNNAMED


def _merge(made: ModelCardData, kept: Mapping[str, Any]) -> ModelCardData:
    """Generated metadata over a person's own; licence and language are the person's to decide."""
    data = dict(kept)
    old_name = data.pop("model_name", None)
    for key, value in made.__dict__.items():
        if value is None or (key in _INHERITED and data.get(key) is not None):
            continue
        if key in _UNION:
            mine = data.get(key) or []
            mine = mine if isinstance(mine, list) else [mine]
            value = [*mine, *(one for one in value if one not in mine)]
        data[key] = value
    data.setdefault("model_name", old_name)
    return ModelCardData(**data)


def _recovery(report: Mapping[str, Any]) -> str:
    steps = []
    if (report.get("metrics") or {}).get("rebuilt"):
        steps.append(
            "the weights that read what was cut were solved again by least squares on calibration "
            "inputs"
        )
    if (report.get("metrics") or {}).get("recalibrated"):
        steps.append("its normalisation statistics were re-estimated on the calibration data")
    if report.get("history"):
        steps.append(_fine_tuned(report.get("recovery") or {}))
    return ", and ".join(steps)


def _fine_tuned(recovery: Mapping[str, Any]) -> str:
    selected, number = recovery.get("selected"), recovery.get("num_held_out")
    words = _selected_state(selected, number) + _trained_with(recovery)
    words += _probed(recovery.get("rates") or [])
    return words + _followed(recovery.get("teacher") or {})


def _followed(teacher: Mapping[str, Any]) -> str:
    parts = []
    if weight := teacher.get("distill"):
        few = f" (its {teacher['top_k']} most probable)" if teacher.get("top_k") else ""
        parts.append(f"outputs{few} with weight {weight:g}")
    if weight := teacher.get("hidden"):
        parts.append(f"hidden states with weight {weight:g}")
    if weight := teacher.get("relations"):
        parts.append(f"cosines between hidden states with weight {weight:g}")
    if not parts:
        return ""
    name = f"another model ({scrub(teacher['id'])})" if teacher.get("id") else "the dense model"
    return f", following the {' and the '.join(parts)} of {name}"


def _trained_with(recovery: Mapping[str, Any]) -> str:
    if not recovery.get("num_samples"):
        return ""
    tokens = recovery.get("num_tokens")
    more = f", {numbers.count(tokens)} tokens" if tokens else ""
    return f", {recovery['num_samples']:,} samples{more} in all"


def _probed(rates: Sequence[Sequence[float]]) -> str:
    if not rates:
        return ""
    best = min(rates, key=lambda each: (each[1], each[0]))
    others = ", ".join(f"{rate:g}" for rate, _ in rates)
    return f", at learning rate {best[0]:g}, the best of {others} after a short probe on the same"


def _selected_state(selected: Mapping[str, Any] | None, number: int | None) -> str:
    if not selected:
        return "it was fine-tuned on the training data"
    judges = f"{number:,} training samples" if number else "training samples"
    judges += " that were held out"
    if selected["epoch"] == 0:
        return f"fine-tuning found no state that is better on {judges}, so that none of it is here"
    epochs = f"{selected['epoch']:.3g} epoch{'s' * (selected['epoch'] != 1)}"
    state = f"the state after {epochs} is the best on {judges}"
    return f"it was fine-tuned on the training data ({state})"


def _calibration(calibration: Mapping[str, Any]) -> str:
    words = []
    if calibration.get("num_samples"):
        words.append(f"{calibration['num_samples']:,} samples")
    if calibration.get("data"):
        words.append(f"of {scrub(str(calibration['data']))}")
    if drawn := calibration.get("drawn_labels"):
        words.append(f"with {drawn} label{'s' * (drawn > 1)} drawn from the model for each")
    if calibration.get("curvature") == "empirical":
        words.append("with the empirical Fisher in place of the curvature, which is not known")
    if calibration.get("seed") is not None:
        words.append(f"(seed {calibration['seed']})")
    return " ".join(words)


@cache
def _template(name: str) -> Template:
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # which is for HTML
        finalize=markdown,
    )
    environment.filters |= {"code": code, "block": block, "markdown": Markdown}
    return environment.from_string((files("sosp_hub.report") / name).read_text(encoding="utf-8"))
