"""transformers models by folder or hub id, through the Auto class of the task."""

import difflib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from torchvision import transforms

from sosp_hub.data.labels import label_order
from sosp_hub.data.processing import ImageProcessing, Processing, TextProcessing, per_channel
from sosp_hub.data.reach import looks_like_path, nearest_existing, reaching_hub
from sosp_hub.data.source import DataInfo
from sosp_hub.errors import ModelError, SospHubError
from sosp_hub.recipe.schema import ModelSection
from sosp_hub.zoo.head import fit_head
from sosp_hub.zoo.loaded import Loaded
from sosp_hub.zoo.origin import Origin, origin_of_folder, origin_on_hub

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

_AUTO = {
    "image-classification": transformers.AutoModelForImageClassification,
    "text-classification": transformers.AutoModelForSequenceClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
}
_INTERPOLATION = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # as PIL numbers them
_ERRORS = (
    *(OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError),
    SafetensorError,
)


def load_transformers(section: ModelSection, data: DataInfo | None = None) -> Loaded:
    """A transformers model with a head that fits the data, and its tokenizer or image processor.

    Raises:
        ModelError: A folder that holds no such model, a task its architecture cannot do, unknown ``kwargs``.
        DataError: A head that does not fit the labels.
        HubError: The hub cannot be reached.
    """
    source = _source(section)
    with _loading(section, source):
        config = _config(section, source, data)
        num_labels, new_head, outputs = None, False, None
        if section.task != "causal-lm":
            outputs = _outputs(section, config)
            num_labels, new_head = fit_head(section, data, outputs)
            _set_labels(config, num_labels, data if new_head else None)
        model = _model(section, source, config, outputs)
        tokenizer = None if section.task == "image-classification" else _tokenizer(section, source)
        images = _image_processor(section, source) if tokenizer is None else None
    if tokenizer is not None and section.task == "text-classification":
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    commit = getattr(config, "_commit_hash", None)
    origin = Origin()
    if isinstance(source, Path):
        origin = origin_of_folder(source)
    elif section.pretrained:
        origin = origin_on_hub(source, section.revision, commit)
    return Loaded(
        model=model.eval(),
        library="transformers",
        task=section.task,
        processor=_processing(section, model, tokenizer, images, data, new_head),
        num_labels=num_labels,
        new_head=new_head,
        tokenizer=tokenizer,
        image_processor=images,
        base_model=origin.base_model,
        base_revision=origin.base_revision,
        card={**origin.card, "pipeline_tag": section.task} if new_head else origin.card,
    )


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
            f"model.id: {path} does not exist; the nearest folder that does is {nearest_existing(path)}"
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
        said = " ".join(str(error).split())[:600]
        raise ModelError(
            f"model: transformers {transformers.__version__} cannot load {section.id!r} for {section.task}: {said}"
        ) from error


def _config(section: ModelSection, source: Path | str, data: DataInfo | None) -> "PretrainedConfig":
    """The configuration with the recipe's ``kwargs``; random models also take the data's channels and size."""
    if isinstance(source, Path):
        record = json.loads((source / "config.json").read_text("utf-8"))
        if "architecture" in record and "model_type" not in record:
            raise ModelError(f"model.id: {source} is a timm checkpoint; write model.library: timm")
    chosen: dict[str, Any] = dict(section.kwargs)
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
    if type(config) not in _AUTO[section.task]._model_mapping:
        raise ModelError(
            f"model.task: transformers has no {config.model_type} for {section.task}; "
            "write another task, or give another model"
        )
    if not section.pretrained and data is not None:
        found = {
            "num_channels": data.image_shape and data.image_shape[0],
            "image_size": data.image_size,
        }
        for key, value in found.items():
            if value and hasattr(config, key) and key not in chosen:
                setattr(config, key, value)
    return config


def _outputs(section: ModelSection, config: "PretrainedConfig") -> int | None:
    """Outputs of the head among the weights; None where they bring none for this task."""
    made_for = _AUTO[section.task]._model_mapping[type(config)]
    classes = made_for if isinstance(made_for, tuple | list) else (made_for,)
    names = {cls.__name__ for cls in classes}
    found = section.pretrained and names.intersection(config.architectures or ())
    return config.num_labels if found else None


def _set_labels(config: "PretrainedConfig", num_labels: int | None, named: DataInfo | None) -> None:
    if num_labels is None or (num_labels == config.num_labels and named is None):
        return
    known = named.class_names if named else ()
    names = [known[i] if i < len(known) else f"LABEL_{i}" for i in range(num_labels)]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def _model(
    section: ModelSection, source: Path | str, config: "PretrainedConfig", old_outputs: int | None
) -> "PreTrainedModel":
    auto, dtype = _AUTO[section.task], getattr(torch, section.dtype)
    if not section.pretrained:
        return auto.from_config(config, dtype=dtype)
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
        if (old[0], *old[1:]) != (old_outputs, *new[1:]) or new[0] != config.num_labels:
            raise ModelError(
                f"model: {name} of {section.id} has shape {list(old)} in the weights, but {list(new)} in the model"
            )
    trunk = [
        name for name in report["missing_keys"] if name.startswith(f"{model.base_model_prefix}.")
    ]
    if trunk:
        log.warning(
            "%s: the weights lack %d tensors, which stay random: %s",
            section.id,
            len(trunk),
            ", ".join(sorted(trunk)[:5]),
        )
    return model


def _tokenizer(section: ModelSection, source: Path | str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(source, revision=section.revision)


def _image_processor(section: ModelSection, source: Path | str) -> Any:
    """The folder's own, or None where it has none."""
    if isinstance(source, Path) and not (source / "preprocessor_config.json").is_file():
        return None
    return transformers.AutoImageProcessor.from_pretrained(source, revision=section.revision)


def _processing(
    section: ModelSection,
    model: "PreTrainedModel",
    tokenizer: Any,
    images: Any,
    data: DataInfo | None,
    new_head: bool,
) -> Processing:
    known = not new_head and data is not None and section.task != "causal-lm"
    names = [model.config.id2label[i] for i in range(model.config.num_labels)] if known else []
    order = label_order(data.class_names, names) if data and known else None
    if tokenizer is None:
        return _image_processing(section, model, images, data, order)
    limits = [
        tokenizer.model_max_length,
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
    ]
    most = min((limit for limit in limits if limit), default=None)
    return TextProcessing(tokenizer, most if most and most < 10**9 else None, order)


def _image_processing(
    section: ModelSection,
    model: "PreTrainedModel",
    own: Any,
    data: DataInfo | None,
    order: tuple[int, ...] | None,
) -> ImageProcessing:
    channels = getattr(model.config, "num_channels", 3)
    size = (
        (data.image_size if data else None)
        or getattr(model.config, "image_size", None)
        or _size(own)
        or (data.image_shape[1:] if data and data.image_shape else 224)
    )
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    mean, std = (0.5,), (0.5,)
    if own is not None:
        mean, std = (own.image_mean, own.image_std) if own.do_normalize else ((0.0,), (1.0,))
    if not section.pretrained and data and data.mean and data.std:
        mean, std = data.mean, data.std
    mean, std = per_channel(mean, channels), per_channel(std, channels)
    return ImageProcessing(
        shape=(channels, height, width),
        mean=mean,
        std=std,
        interpolation=_INTERPOLATION.get(getattr(own, "resample", None), "bilinear"),
        key="pixel_values",
        transform=partial(_transform, own, (height, width), mean, std),
        label_order=order,
    )


@dataclass(frozen=True)
class _Own:
    """The image processor that came with the model, after a mirror where training asks for one."""

    processor: Any
    mirrored: bool

    def __call__(self, image: "Image") -> "Tensor":
        if self.mirrored and torch.rand(()) < 0.5:
            image = transforms.functional.hflip(image)
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def _transform(
    own: Any,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: bool,
) -> "Callable[[Image], Tensor]":
    """The model's own processor where it makes this size, else a plain change of size."""
    if own is not None and _size(own) == size and len(mean) == len(own.image_mean):
        return _Own(own, augment)
    steps = [transforms.RandomHorizontalFlip()] if augment else []
    steps += [transforms.Resize(size), transforms.ToTensor(), transforms.Normalize(mean, std)]
    return transforms.Compose(steps)


def _size(own: Any) -> tuple[int, int] | None:
    """Height and width of what the image processor gives."""
    crop = getattr(own, "crop_size", None) if getattr(own, "do_center_crop", False) else None
    size = crop or getattr(own, "size", None)
    if not size:
        return None
    get = size.get if hasattr(size, "get") else partial(getattr, size)
    side = get("shortest_edge", None)
    return (get("height", None) or side, get("width", None) or side)
