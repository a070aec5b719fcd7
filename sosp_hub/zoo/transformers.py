"""transformers models by folder or hub id, through the Auto class of the task."""

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError

from sosp_hub.compat.transformers import build, classes_for
from sosp_hub.data.labels import label_order
from sosp_hub.data.processing import OwnProcessing
from sosp_hub.data.reach import looks_like_path, nearest_existing, reaching_hub
from sosp_hub.data.source import DataInfo
from sosp_hub.errors import ModelError, SospHubError
from sosp_hub.recipe.schema import ModelSection
from sosp_hub.recipe.tasks import Task, find_task, tasks
from sosp_hub.untrusted import UnreadableError, read_json
from sosp_hub.zoo.head import fit_head
from sosp_hub.zoo.loaded import Loaded
from sosp_hub.zoo.origin import Origin, origin_of_folder, origin_on_hub
from sosp_hub.zoo.processors import as_trained, image_processing, text_processing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_ERRORS = (
    *(OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError),
    SafetensorError,
)


def load_transformers(
    section: ModelSection, data: DataInfo | None = None, *, weights: bool = True
) -> Loaded:
    """A transformers model with a head that fits the data, and its tokenizer or image processor.

    Args:
        section: Which.
        data: What the head has to fit, where known.
        weights: Load them; without, the model is on the meta device, and of texts no tokenizer is
            read, so that ``config.json`` is enough.

    Raises:
        ModelError: A folder that holds no such model, a task its architecture cannot do, unknown
            ``kwargs``.
        DataError: A head that does not fit the labels.
        HubError: The hub cannot be reached.
    """
    source, task = _source(section), find_task(section.task)
    with _loading(section, source):
        config = _config(section, source, data)
        num_labels, new_head, outputs = None, False, None
        if task.head:
            outputs = _outputs(section, config)
            num_labels, new_head = fit_head(section, data, outputs)
            _set_labels(config, num_labels, data if new_head else None)
        if new_head or not task.head:
            task.configure(config, data)
        model = _model(section, source, config, outputs) if weights else _bare(section, config)
        inputs = (data.inputs if data else None) or task.inputs
        tokenizer = _tokenizer(section, source) if inputs == "texts" and weights else None
        images = _image_processor(section, source) if inputs == "images" else None
        if inputs == "own":
            images = _own_processor(section, source, task, data)
    if tokenizer is not None and task.head:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    origin = Origin()
    if isinstance(source, Path):
        origin = origin_of_folder(source)
    elif section.pretrained and weights:
        origin = origin_on_hub(source, section.revision)
    order = None if num_labels is None or new_head else _order(data, config)
    if task.head and data is not None and not new_head:
        _name_outputs(model.config, data)
    if inputs == "texts":
        processor = text_processing(model.config, tokenizer, order)
    elif inputs == "own":
        size = {"image_size": data.first_size} if data and data.first_size else {}
        processor = OwnProcessing(images, model.config, order, **size)
    else:
        processor = image_processing(section, model.config, images, data, order, model)
        images = as_trained(images, processor)
    return Loaded(
        model=model.eval(),
        library="transformers",
        task=section.task,
        processor=processor,
        num_labels=num_labels,
        new_head=new_head,
        tokenizer=tokenizer,
        image_processor=images,
        base_model=origin.base_model,
        base_revision=origin.base_revision,
        card={**origin.card, "pipeline_tag": section.task} if new_head else origin.card,
    )


def _builders(task: Task, config: Any) -> tuple[Any, ...]:
    """The classes of transformers that can build models of the task with a config."""
    if task.by_type:
        name = task.by_type.get(config.model_type)
        return () if name is None else (getattr(transformers, name),)
    if not task.auto_class:  # whatever the weights are of
        names = config.architectures or ()
        known = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
        return tuple(known) or (transformers.AutoModel,)
    autos = [getattr(transformers, name) for name in (task.auto_class, *task.other_auto_classes)]
    return tuple(auto for auto in autos if classes_for(auto, type(config)))


def _classes(task: Task, config: Any) -> set[str]:
    """Names of the model classes that do the task with a config."""
    builders = _builders(task, config)
    return {cls.__name__ for each in builders for cls in classes_for(each, type(config))}


def silence() -> None:
    """No log lines and no bars of transformers', which would cross ours."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _source(section: ModelSection) -> Path | str:
    """A local folder, or a hub id."""
    path = Path(section.id).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"model.id: {path} has no config.json, so it is no transformers checkpoint"
            )
        return path
    if path.is_file():
        raise ModelError(
            f"model.id: {path} is a file; give the folder that holds it and config.json"
        )
    if looks_like_path(section.id):
        raise ModelError(
            f"model.id: {path} does not exist; the nearest folder that does is "
            f"{nearest_existing(path)}"
        )
    return section.id


@contextmanager
def _loading(section: ModelSection, source: Path | str) -> Iterator[None]:
    """Says what failed in the words of the recipe, also for what the hub's client raises."""
    try:
        with nullcontext() if isinstance(source, Path) else reaching_hub("model", source):
            yield
    except SospHubError:
        raise
    except _ERRORS as error:
        message = " ".join(str(error).split())[:600]
        raise ModelError(
            f"model: transformers {transformers.__version__} cannot load {section.id!r} for "
            f"{section.task}: {message}"
        ) from error


def _config(section: ModelSection, source: Path | str, data: DataInfo | None) -> Any:
    """The config with the recipe's ``kwargs``; random weights also take the data's channels."""
    if isinstance(source, Path):
        try:
            record = read_json(source / "config.json")
        except UnreadableError as error:
            raise ModelError(f"model.id: {source / 'config.json'}: {error}") from error
        if not isinstance(record, dict):
            raise ModelError(f"model.id: {source / 'config.json'} holds no config")
        if "architecture" in record and "model_type" not in record:
            raise ModelError(f"model.id: {source} is a timm checkpoint; write model.library: timm")
    chosen: dict[str, Any] = dict(section.kwargs)
    config: Any
    config, unused = transformers.AutoConfig.from_pretrained(
        source, revision=section.revision, return_unused_kwargs=True, **chosen
    )
    if unused:
        odd = next(iter(unused))
        close = difflib.get_close_matches(odd, config.to_dict(), n=1)
        raise ModelError(
            f"model.kwargs: the config of {config.model_type} has no {odd!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    if not _builders(find_task(section.task), config):
        able = [name for name, task in tasks().items() if task.head and _builders(task, config)]
        raise ModelError(
            f"model.task: transformers has no {config.model_type} for {section.task}; write "
            f"{' or '.join(able) or 'self'}, or give another model"
        )
    if not section.pretrained and data is not None:
        settings = {
            "num_channels": data.image_shape and data.image_shape[0],
            "image_size": data.image_size,
        }
        for key, value in settings.items():
            if value and hasattr(config, key) and key not in chosen:
                setattr(config, key, value)
    return config


def _outputs(section: ModelSection, config: Any) -> int | None:
    """Outputs of the head among the weights; None where they bring none for this task."""
    names = _classes(find_task(section.task), config)
    has_head = section.pretrained and names.intersection(config.architectures or ())
    return config.num_labels if has_head else None


def _order(data: DataInfo | None, config: Any) -> tuple[int, ...] | None:
    names = [config.id2label[i] for i in range(config.num_labels)]
    return label_order(data.class_names, names) if data else None


def _name_outputs(config: Any, data: DataInfo) -> None:
    """Gives outputs that are called LABEL_0, LABEL_1 ... the names of the data's classes.

    They were matched by position, so that all that is measured is of these names.
    """
    count = len(data.class_names)
    unnamed = config.id2label == {i: f"LABEL_{i}" for i in range(count)}
    if unnamed and not any(name.isdecimal() for name in data.class_names):
        _set_labels(config, count, data)


def _set_labels(config: Any, num_labels: int | None, named: DataInfo | None) -> None:
    if num_labels is None or (num_labels == config.num_labels and named is None):
        return
    known = named.class_names if named else ()
    names = [known[i] if i < len(known) else f"LABEL_{i}" for i in range(num_labels)]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def _model(
    section: ModelSection, source: Path | str, config: Any, old_outputs: int | None
) -> "PreTrainedModel":
    auto, dtype = _builders(find_task(section.task), config)[0], getattr(torch, section.dtype)
    if not section.pretrained:
        return build(auto, config, dtype)
    _tell_wider(section, config, dtype)
    replaced = old_outputs is not None and old_outputs != config.num_labels
    model, report = auto.from_pretrained(
        source,
        config=config,
        revision=section.revision,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=replaced,
    )
    for name, old, new in report["mismatched_keys"]:
        more = old[0] - (old_outputs or 0)  # than labels: a detector's "no object"
        if old[1:] != new[1:] or more not in (0, 1) or new[0] != config.num_labels + more:
            raise ModelError(
                f"model: {name} of {section.id} has shape {list(old)} in the weights, but "
                f"{list(new)} in the model"
            )
    if section.task == "text-generation":
        _check_causal(model)
    trunk = "" if section.task == "text-generation" else f"{model.base_model_prefix}."
    lacking = [name for name in report["missing_keys"] if name.startswith(trunk)]
    if lacking:  # new heads of classifiers are told elsewhere
        log.warning(
            "%s: the weights lack %d tensors, which stay random: %s",
            section.id,
            len(lacking),
            ", ".join(sorted(lacking)[:5]),
        )
    return model


def _tell_wider(section: ModelSection, config: Any, dtype: torch.dtype) -> None:
    stored = getattr(config, "dtype", None)
    stored = getattr(torch, stored, None) if isinstance(stored, str) else stored
    if isinstance(stored, torch.dtype) and stored.itemsize < dtype.itemsize:
        name = str(stored).removeprefix("torch.")
        log.warning(
            "model.dtype: %s is stored in %s; it is read, measured and saved in %s, %d times as "
            "many bytes. model.dtype=%s keeps it as it is",
            *(section.id, name, section.dtype, dtype.itemsize // stored.itemsize, name),
        )


def _bare(section: ModelSection, config: Any) -> "PreTrainedModel":
    """The same model without data."""
    auto, dtype = _builders(find_task(section.task), config)[0], getattr(torch, section.dtype)
    with torch.device("meta"):
        return build(auto, config, dtype)


@torch.no_grad()
def _check_causal(model: "PreTrainedModel") -> None:
    """Sees that no token's logits depend on a later token, as an encoder's would."""
    tokens = torch.arange(8).repeat(2, 1)
    tokens[1, -1] = 9
    first, second = model.eval()(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1]
    noise = max(1e-4, 8 * torch.finfo(first.dtype).eps)
    if (first - second).abs().max() > noise * first.abs().max():
        raise ModelError(
            f"model.task: this {model.config.model_type} looks at later tokens, so it is an "
            "encoder and generates no text; write model.task: text-classification, or fill-mask, "
            "or give a decoder"
        )


def _tokenizer(section: ModelSection, source: Path | str) -> Any:
    """The model's own; where its files lack, transformers makes one of special tokens alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=section.revision)
    ordinary = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if len(ordinary) < 3:  # T5's has a space mark
        raise ModelError(
            f"model: {source} has no tokenizer, so every text would be made of unknown tokens; "
            "put the files of its tokenizer (tokenizer.json, tokenizer_config.json) beside "
            "config.json"
        )
    return tokenizer


def _own_processor(
    section: ModelSection, source: Path | str, task: Task, data: DataInfo | None
) -> Any:
    """What the task's class of processors makes of the files beside the weights."""
    if task.auto_processor is None:
        return None
    auto = getattr(transformers, task.auto_processor)
    if isinstance(source, Path) and not any((source / name).is_file() for name in _PROCESSORS):
        raise ModelError(
            f"model: {source} has no {' and no '.join(_PROCESSORS)}, so nothing says how inputs of "
            f"{task.name} are made; save them beside config.json with "
            f"{task.auto_processor}.from_pretrained(BASE).save_pretrained(FOLDER)"
        )
    own = auto.from_pretrained(source, revision=section.revision)
    asked = data.image_size if data else None
    images = getattr(own, "image_processor", own)
    if asked and hasattr(images, "size"):
        images.size = type(images.size)(height=asked, width=asked)
    return own


_PROCESSORS = "preprocessor_config.json", "processor_config.json"


def _image_processor(section: ModelSection, source: Path | str) -> Any:
    """The folder's own, or None where it has none."""
    if isinstance(source, Path) and not (source / "preprocessor_config.json").is_file():
        return None
    return transformers.AutoImageProcessor.from_pretrained(source, revision=section.revision)
