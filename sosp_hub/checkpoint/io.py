"""Saves and loads pruned models: a plain config, plus a delta where that is not enough."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sosp_hub.checkpoint import sentence
from sosp_hub.checkpoint.format import headers
from sosp_hub.checkpoint.format.bounds import check_code, check_counts, is_widened, outgrows_files
from sosp_hub.checkpoint.format.folder import replaced_folder
from sosp_hub.checkpoint.format.record import Builder, library_in
from sosp_hub.checkpoint.skeleton import misfits, model_class
from sosp_hub.checkpoint.unregistered import tell_unregistered
from sosp_hub.checkpoint.weightless import holds_only_a_plan
from sosp_hub.compat.accelerate import check_weights
from sosp_hub.compat.timm import is_whole
from sosp_hub.compat.torch import packed_weight, unwrapped
from sosp_hub.compat.versions import tell_newer
from sosp_hub.data.reach import hub_is_off, only_cached
from sosp_hub.errors import CheckpointError, HubError, ModelError, SospHubError, shortened
from sosp_hub.modes import in_own_modes

REPORT = "sosp_report.json"
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_LOG = logging.getLogger(__name__)


@in_own_modes
def save_pretrained(
    model: Any,
    folder: str | Path,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    report: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    max_shard_size: int | str = "5GB",
    ship_code: bool = False,
) -> Path:
    """Writes a pruned model so that it loads again: by transformers, timm or `from_pretrained`.

    The folder is written beside its place and renamed, so an interrupted save leaves what was
    there. Before that, what its config builds is compared with the model.

    Args:
        model: A transformers or timm model, or any other module, which its reader builds by the
            same code (``from_pretrained(folder, model=Net())``). A SentenceTransformer is written
            in its own layout.
        folder: Where to. Weights of an older save are removed, other files stay.
        base_model: Hub id of the model that was pruned; goes into the report.
        base_revision: Its commit.
        report: What is known about the pruning, as JSON data; written as ``sosp_report.json``.
        tokenizer: Saved beside the model.
        processor: Image processor, feature extractor or processor; saved beside the model.
        max_shard_size: Size of one weight file (a timm model without delta is always one file).
        ship_code: Also write ``modeling_sosp_hub.py``, which ``trust_remote_code=True`` loads
            without this package.

    Returns:
        The folder.

    Raises:
        CheckpointError: A model that the files could not rebuild.
        OutputError: The folder cannot be written; what was there stays.
        ModelError: Adapters that were not merged, or no weights.

    Example:
        >>> import sosp_hub, tempfile, timm, torch
        >>> net = timm.create_model("test_resnet", num_classes=5).eval()
        >>> graph = sosp_hub.trace(net, (torch.randn(1, 3, 32, 32),))
        >>> scores = sosp_hub.score(net, graph, [], criterion="magnitude")
        >>> plan = sosp_hub.allocate(graph, scores, params=0.7)
        >>> small, folder = sosp_hub.apply(net, graph, plan), tempfile.mkdtemp()
        >>> path = sosp_hub.save_pretrained(small, folder)
        >>> again = sosp_hub.from_pretrained(folder)
        >>> image = torch.randn(1, 3, 32, 32)
        >>> torch.equal(again(image), small(image))
        True
    """
    tell_newer()
    for given, kind in ((model, nn.Module), (folder, str | Path)):
        if not isinstance(given, kind):
            raise CheckpointError(
                f"save_pretrained got a {type(model).__name__} and a {type(folder).__name__}; "
                "expected save_pretrained(model, folder)"
            )
    folder = Path(folder)
    model = unwrapped(model)
    check_not_quantised(model)
    check_weights(model, "save_pretrained")
    tell_unregistered(model)
    is_sentences = sentence.is_sentence_transformer(model)
    library = "torch" if is_sentences else library_of(model)
    with replaced_folder(folder) as fresh:
        if is_sentences:
            obstacle = sentence.write(model, fresh)
        elif library == "transformers":
            from sosp_hub.checkpoint.transformers.save import write

            obstacle = write(model, fresh, max_shard_size=max_shard_size, ship_code=ship_code)
        elif library == "timm":
            from sosp_hub.checkpoint.timm.save import write

            obstacle = write(model, fresh, max_shard_size=max_shard_size)
        else:
            from sosp_hub.checkpoint.torch.save import write

            obstacle = write(model, fresh, max_shard_size=max_shard_size)
        for extra in (tokenizer, processor):
            if extra is not None and hasattr(extra, "save_pretrained"):
                extra.save_pretrained(fresh)
        record = dict(report or {})
        if base_model is not None or base_revision is not None:
            base = {"model": base_model, "revision": base_revision}
            record["base"] = {
                **base,
                **{k: v for k, v in record.get("base", {}).items() if v is not None},
            }
        if record:
            (fresh / REPORT).write_text(json.dumps(record, indent=1, default=_as_json) + "\n")
    if is_uniform(record.get("plan")):
        tell_obstacle(obstacle)
    return folder


def check_not_quantised(model: nn.Module) -> None:
    """Refuses weights that another package has packed: their values are no longer those cut.

    Raises:
        CheckpointError: Names the first of them, and the order that works.
    """
    if packed := packed_weight(model):
        raise CheckpointError(
            f"{packed}; save or export the model first, then quantise what "
            "from_pretrained(FOLDER, quantization_config=...) loads, and save that with its own "
            "save_pretrained"
        )


def check_no_adapters(model: nn.Module) -> None:
    """Refuses adapters that were not merged.

    Raises:
        ModelError: Says how.
    """
    if hasattr(model, "merge_and_unload"):
        raise ModelError(
            f"{type(model).__name__}: it has adapters beside its weights; save or export "
            "model.merge_and_unload(), or save the adapters alone by model.save_pretrained(folder)"
        )


def is_uniform(plan: Any) -> bool:
    """Whether a plan, as data, was to leave a model that a plain config describes."""
    provenance = plan.get("provenance") if isinstance(plan, Mapping) else None
    return isinstance(provenance, Mapping) and provenance.get("uniform") is True


def tell_obstacle(obstacle: str) -> None:
    """Says that a uniform cut needs a delta all the same, and why."""
    if obstacle:
        _LOG.warning(
            "uniform=True was asked, but no plain config describes the model: %s. Its checkpoint "
            "has a delta, and needs sosp_hub to load",
            obstacle,
        )


@in_own_modes
def from_pretrained(path_or_id: str | Path, **kwargs: Any) -> nn.Module:
    """Loads a checkpoint that holds weights; see `sosp_hub.cut.from_pretrained`.

    Args:
        path_or_id: A folder or a hub id.
        **kwargs: For the hub and for the library.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: Damaged or hostile files, or weights that are not those of the config.
        HubError: A hub that cannot be reached, or has no such model.
    """
    tell_newer()
    return load(fetch(path_or_id, kwargs), kwargs, str(path_or_id))


def load(folder: Path, kwargs: dict[str, Any], name: str) -> nn.Module:
    """Loads the checkpoint in a folder.

    Args:
        folder: Holds a config and weights.
        kwargs: For the library; ``model_class``.
        name: What the caller calls it, for messages.

    Raises:
        CheckpointError: Damaged or hostile files, or weights that are not those of the config.
    """
    if kwargs.pop("ignore_mismatched_sizes", False):
        raise CheckpointError(
            "ignore_mismatched_sizes=True fills every tensor of another size with random numbers; "
            "load the pruned model without it, and replace its head afterwards"
        )
    if holds_only_a_plan(folder):
        raise CheckpointError(
            f"{name}: holds a plan and no weights; where a base model is expected, give one "
            f"that has them. sosp_hub.apply_plan_file(PLAN, base=...) cuts a base by a plan"
        )
    config = headers.read_json(folder / headers.CONFIG)
    tensors = headers.read_tensors(folder)
    library = library_in(config)
    if library == "torch":
        from sosp_hub.checkpoint.torch.read import read as read_torch

        return read_torch(folder, config, tensors, kwargs, name)
    if "model" in kwargs:
        raise CheckpointError(
            f"{name}: {library} builds the model of this folder by itself; leave model= out"
        )
    check_counts(config, tensors)
    check_code(config)
    is_timm = library == "timm"
    is_adapted = is_timm and kwargs.keys() - {"dtype"}  # timm makes up what no longer fits
    looks_wrong = is_adapted or is_widened(config) or outgrows_files(config, tensors)
    if looks_wrong and (fault := next(misfits(folder, config, tensors), None)):
        raise CheckpointError(f"{name}: {fault}")
    try:
        if is_timm:
            from sosp_hub.checkpoint.timm.read import read as read_timm

            return read_timm(folder, tensors, kwargs)
        from sosp_hub.checkpoint.transformers.read import read as read_transformers

        return read_transformers(folder, config, model_class(config), kwargs)
    except (SospHubError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a library meets damaged files with whatever error comes first
        cause = _first_misfit(folder, config, tensors) or f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{name}: {cause}") from error


def library_of(model: nn.Module) -> Builder:
    """Which library's files a model is saved in; ``torch`` = none's.

    Raises:
        ModelError: Adapters that were not merged.
    """
    check_no_adapters(model)
    if hasattr(model, "save_pretrained") and hasattr(getattr(model, "config", None), "model_type"):
        return "transformers"
    if is_whole(model):
        return "timm"
    return "torch"


def fetch(path_or_id: str | Path, kwargs: dict[str, Any]) -> Path:
    """The local folder of a model, downloaded where it is a hub id.

    Args:
        path_or_id: A folder or a hub id.
        kwargs: The hub's own arguments are taken out of these.

    Raises:
        CheckpointError: Neither a folder nor a hub id.
        HubError: The hub cannot be reached, or has no such model.
    """
    if not isinstance(path_or_id, str | Path):
        raise CheckpointError(
            f"from_pretrained got a {type(path_or_id).__name__}; expected a folder or a hub id"
        )
    keys = ("revision", "token", "cache_dir", "force_download", "local_files_only")
    hub = {key: kwargs.pop(key) for key in keys if key in kwargs}
    if (folder := headers.local_folder(path_or_id)) is not None:
        return folder
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from sosp_hub.compat.huggingface_hub import transport_error

    cached = only_cached() and not hub.get("force_download")
    if cached:
        hub["local_files_only"] = True
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=_WANTED, **hub))
    except HFValidationError as error:
        raise CheckpointError(
            f"{shortened(str(path_or_id))}: no such folder, and no hub id either"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, transport_error()) as error:
        why = f"the hub does not give it ({error})"
        if cached:
            off = "is turned off by HF_HUB_OFFLINE" if hub_is_off() else "cannot be reached"
            why = f"it is not in the cache, and {constants.ENDPOINT} {off}"
        raise HubError(
            f"{path_or_id}: no such folder here, and {why}; without network, pass the folder of a "
            "downloaded model"
        ) from error


def _first_misfit(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, headers.TensorHeader]
) -> str | None:
    """The first tensor whose size in the file is not what the config builds."""
    import transformers

    from sosp_hub.checkpoint.transformers.load import build_meta

    if (cls := model_class(config)) is None:
        return None
    try:
        built = build_meta(cls, transformers.AutoConfig.from_pretrained(folder)).state_dict()
    except Exception:  # noqa: BLE001 - the error that led here says it
        return None
    for name, tensor in built.items():
        if name in tensors and tensors[name].shape != tuple(tensor.shape):
            return (
                f"tensor {name!r}: {tensors[name].file} holds {list(tensors[name].shape)}, "
                f"the config builds {list(tensor.shape)}"
            )
    return None


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    listed = getattr(value, "tolist", None)
    return listed() if callable(listed) else str(value)
