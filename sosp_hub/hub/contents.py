"""What may be published: a whole model, a card that the hub takes, and no secrets."""

from pathlib import Path
from typing import Any

from huggingface_hub import get_session
from huggingface_hub.utils import hf_raise_for_status

from sosp_hub.checkpoint.format import headers
from sosp_hub.checkpoint.format.record import KEY, library_in
from sosp_hub.checkpoint.format.schema import parse_delta
from sosp_hub.checkpoint.format.weight_files import is_weight_file
from sosp_hub.errors import CheckpointError, HubError, has_token, shortened
from sosp_hub.report.facts import hub_id
from sosp_hub.report.listing import CARD, DENSE, RECIPE, REPORT
from sosp_hub.report.markers import read_card
from sosp_hub.report.snippets import read_checkpoint
from sosp_hub.untrusted import MOST_CARD_BYTES, UnreadableError, read_text

_TEXT_SUFFIXES = (".md", ".json", ".yaml", ".yml", ".txt", ".html", ".jinja", ".py", ".log")
_MOST_TEXT_BYTES = 20_000_000
_MOST_FAULTS = 5


def local_files(folder: Path) -> list[str]:
    """Names of the files to publish, relative to the folder.

    Hidden and unfinished ones are not published, nor are the dense model and the recipe with the
    paths of this machine.
    """
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        name.as_posix()
        for name in names
        if not any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        and name.parts[0] not in (DENSE, RECIPE)
        and name.suffix != ".part"
    ]


def check_folder(folder: Path, secret: str | None = None) -> None:
    """Refuses a folder that is no saved model, has no card or report, or holds a token.

    Raises:
        HubError: With what to do.
    """
    if not folder.is_dir():
        raise HubError(f"{folder}: no such folder; give the output folder of a run")
    read_checkpoint(folder)
    names = local_files(folder)
    if not any(is_weight_file(name) and name.endswith(".safetensors") for name in names):
        raise HubError(
            f"{folder}: there are no weights (model.safetensors); "
            "write the folder with sosp_hub.save_pretrained(model, folder)"
        )
    if REPORT not in names and CARD not in names:
        raise HubError(
            f"{folder}: there is neither sosp_report.json nor README.md, so nobody could tell what "
            "this model is; save it with save_pretrained(model, folder, report=...), or write a "
            "README.md"
        )
    for name in names:
        path = folder / name
        if path.suffix in _TEXT_SUFFIXES and path.stat().st_size <= _MOST_TEXT_BYTES:
            text = path.read_text(encoding="utf-8", errors="replace")
            if has_token(text) or (secret and secret in text):
                raise HubError(
                    f"{path}: holds an access token; remove it, and revoke it if anyone saw it"
                )


def check_weights(folder: Path) -> None:
    """Refuses weight files that are damaged, or not those of the config.

    What the config builds can be told of transformers', timm's and sosp_hub's own checkpoints; a
    folder whose code is not at hand passes.

    Raises:
        HubError: With the first disagreements.
    """
    if not any((folder / name).is_file() for name in (headers.WEIGHTS, headers.INDEX)):
        return  # of another layout
    from sosp_hub.checkpoint.skeleton import disagreements  # here: it brings torch
    from sosp_hub.checkpoint.torch.read import stray

    config = read_checkpoint(folder).config
    again = "save the model again with sosp_hub.save_pretrained(model, folder)"
    try:
        tensors = headers.read_tensors(folder)
    except CheckpointError as error:
        raise HubError(f"{error}; {again}") from error
    try:
        if library_in(config) == "torch":
            faults = list(stray(parse_delta(config[KEY]), tensors))
        else:
            faults = list(disagreements(folder, config, tensors))
    except CheckpointError:  # of code that is not at hand: nothing to compare with
        return
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults[:_MOST_FAULTS])
        more = len(faults) - _MOST_FAULTS
        raise HubError(
            f"{folder}: config and weights disagree, so that nobody could load the model\n{lines}\n"
            + (f"  and {more} more, which sosp inspect lists\n" if more > 0 else "")
            + again
        )


def check_card(folder: Path) -> None:
    """Refuses metadata that the hub would refuse, before anything is sent.

    Raises:
        HubError: With every fault.
    """
    path = folder / CARD
    if not path.is_file():
        return
    try:
        data, _ = read_card(read_text(path, MOST_CARD_BYTES))
    except UnreadableError as error:
        raise HubError(f"{path}: {error}") from error
    faults = [*_ids(data, "base_model"), *_ids(data, "datasets")]
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise HubError(f"{path}: the hub would refuse the metadata\n{lines}")


def check_with_hub(card: str, endpoint: str) -> None:
    """Has the hub judge a card's metadata; a folder without a card has none.

    Asked directly, because ``ModelCard.validate`` of older clients always asks huggingface.co.

    Raises:
        HubError: The hub refuses it.
    """
    if not card:
        return
    question = {"repoType": "model", "content": card}
    response = get_session().post(f"{endpoint}/api/validate-yaml", json=question)
    if response.status_code == 400:
        faults = response.json().get("errors", [])
        lines = "\n".join(f"  - {fault.get('message')}" for fault in faults)
        raise HubError(f"README.md: the hub refuses the metadata at its top\n{lines}")
    hf_raise_for_status(response)


def _ids(data: dict[str, Any], key: str) -> list[str]:
    value = data.get(key) or []
    names = value if isinstance(value, list) else [value]
    return [
        f"{key}: {shortened(repr(name))} is a local path or no hub id; write NAMESPACE/NAME, or "
        "leave it out"
        for name in names
        if hub_id(name) is None and not (key == "datasets" and "/" not in str(name))
    ]
