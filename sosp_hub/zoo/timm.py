"""timm models: by name, local folder, weight file or hub id; and the CIFAR ResNets in timm.

Importing this file is enough for ``timm.create_model("cifar_resnet20")``.
"""

import difflib
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.models import load_state_dict

from sosp_hub.data.labels import label_order
from sosp_hub.data.processing import ImageProcessing, per_channel
from sosp_hub.data.reach import looks_like_path, nearest_existing, reaching_hub
from sosp_hub.data.source import DataInfo
from sosp_hub.errors import ModelError
from sosp_hub.recipe.schema import ModelSection
from sosp_hub.recipe.tasks import find_task
from sosp_hub.untrusted import UnreadableError, read_json
from sosp_hub.zoo import cifar_resnet  # noqa: F401 - registers its models
from sosp_hub.zoo.head import fit_head
from sosp_hub.zoo.loaded import Loaded
from sosp_hub.zoo.origin import Origin, origin_of_folder, origin_on_hub

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from torch import Tensor, nn

log = logging.getLogger(__name__)

_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pth", ".pt"}
_ERRORS = (
    *(RuntimeError, TypeError, ValueError, KeyError, AssertionError, OSError),
    SafetensorError,
)
_ORIGIN_KEYS = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "tag")


def load_timm(
    section: ModelSection, data: DataInfo | None = None, *, weights: bool = True
) -> Loaded:
    """A timm model with a head, input channels and input size that fit the data.

    Pretrained weights keep their own normalisation; a model that starts at random takes the data's.

    Args:
        section: Which.
        data: What it has to fit, where known.
        weights: Load them; without, the model is on the meta device, where its code allows.

    Raises:
        ModelError: An unknown name, a folder or file that holds no such model, no pretrained
            weights.
        DataError: A head that does not fit the labels.
        HubError: The hub cannot be reached.
    """
    name, config = _describe(section)
    kwargs: dict[str, Any] = dict(section.kwargs)
    overlay: dict[str, Any] = {}
    if (file := kwargs.pop("checkpoint_path", None)) is not None and weights:
        overlay = _weights_of_file(Path(str(file)), config)
    own = {**config, **overlay}
    task = find_task(section.task)
    if headless := not task.head and bool(task.auto_class):
        num_labels, new_head = None, False
    else:
        brought = own["num_classes"] if section.pretrained else None
        num_labels, new_head = fit_head(section, data, brought)
    kwargs |= _input_kwargs(section, own, data)
    if section.revision and ":" not in name and own.get("hf_hub_id") and not overlay:
        overlay = {"hf_hub_id": f"{own['hf_hub_id']}@{section.revision}"}
    num_classes = 0 if headless else num_labels
    model = _create(
        section, name, num_classes=num_classes, overlay=overlay, weights=weights, **kwargs
    )
    origin = _origin(section, model, file) if weights else Origin()
    processor = _processor(section, model, kwargs, data)
    _describe_weights(model, section, processor, data if new_head else None)
    return Loaded(
        model=model.to(getattr(torch, section.dtype)).eval(),
        library="timm",
        task=section.task,
        processor=processor,
        num_labels=num_labels,
        new_head=new_head,
        base_model=origin.base_model,
        base_revision=origin.base_revision,
        card=origin.card,
    )


def _describe(section: ModelSection) -> tuple[str, dict[str, Any]]:
    """What to call the model in ``timm.create_model``, and the configuration of its weights."""
    given = next((section.id[len(s) :] for s in _SOURCES if section.id.startswith(s)), section.id)
    path = Path(given).expanduser()
    if path.is_dir():
        return f"local-dir:{path}", _read_config(path / "config.json")
    if path.is_file():
        raise ModelError(
            f"model.id: {path} is a file; write the architecture as model.id and the file as "
            f"model.kwargs: {{checkpoint_path: {path}}}"
        )
    if looks_like_path(given) or section.id.startswith("local-dir:"):
        raise ModelError(
            f"model.id: {path} does not exist; the nearest folder that does is "
            f"{nearest_existing(path)}"
        )
    if "/" in given:
        from huggingface_hub import hf_hub_download

        with reaching_hub("model", given):
            file = hf_hub_download(given, "config.json", revision=section.revision)
        revision = f"@{section.revision}" if section.revision else ""
        return f"hf-hub:{given}{revision}", _read_config(Path(file))
    architecture = given.split(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else "."
        raise ModelError(
            f"model.id: timm {timm.__version__} has no model {given!r}{meant} A folder or a hub id "
            "(OWNER/NAME) is possible too"
        )
    try:
        config: Any = timm.get_pretrained_cfg(given, allow_unregistered=False)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
        raise ModelError(
            f"model.id: timm has no weights {given!r}; for {architecture} it has {tags}"
        ) from error
    if section.pretrained and not config.has_weights and "checkpoint_path" not in section.kwargs:
        raise ModelError(
            f"model.pretrained: timm has no pretrained weights for {given!r}; write "
            "model.pretrained: false and a model.train section, or model.kwargs: "
            "{checkpoint_path: FILE}"
        )
    return given, config.to_dict()


def _read_config(file: Path) -> dict[str, Any]:
    """The weights' configuration from a ``config.json`` as timm writes it."""
    try:
        config = read_json(file)
    except UnreadableError as error:
        if file.exists():
            raise ModelError(f"model.id: cannot read {file} ({error})") from error
        raise ModelError(
            f"model.id: {file.parent} has no config.json, so it is no timm checkpoint; for a bare "
            "weight file write model.kwargs: {checkpoint_path: FILE} and the architecture as "
            "model.id"
        ) from error
    if not isinstance(config, dict) or "architecture" not in config:
        kind = config.get("model_type") if isinstance(config, dict) else None
        advice = "; it is a transformers model: write model.library: transformers" if kind else ""
        raise ModelError(f"model.id: {file} names no timm architecture{advice}")
    own = dict(config.get("pretrained_cfg", config))
    for key in ("num_classes", "label_names", "model_args"):
        if key in config:
            own[key] = config[key]
    own.setdefault("num_classes", 1000)
    return own


def _weights_of_file(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A weight file in place of timm's own weights, with the number of classes that it has."""
    file = file.expanduser()
    if not file.is_file():
        raise ModelError(
            f"model.kwargs.checkpoint_path: {file} does not exist; the nearest folder that does is "
            f"{nearest_existing(file)}"
        )
    if file.suffix not in _WEIGHT_SUFFIXES:
        raise ModelError(
            f"model.kwargs.checkpoint_path: {file} ends in {file.suffix!r}, expected one of "
            f"{', '.join(sorted(_WEIGHT_SUFFIXES))}"
        )
    try:
        weights = load_state_dict(str(file), weights_only=True)
    except Exception as error:
        raise ModelError(
            f"model.kwargs.checkpoint_path: {file} cannot be read as weights ({error})"
        ) from error
    classifier = config.get("classifier")
    classifier = classifier[0] if isinstance(classifier, list | tuple) else classifier
    head = weights.get(f"{classifier}.weight")
    num_classes = config["num_classes"] if head is None else head.shape[0]
    return {"state_dict": weights, "num_classes": num_classes, "hf_hub_id": None, "url": ""}


def _input_kwargs(
    section: ModelSection, config: dict[str, Any], data: DataInfo | None
) -> dict[str, Any]:
    """Channels and, for models that are built for one size, the size."""
    chosen: dict[str, Any] = {}
    saved = config.get("model_args") or {}
    if not section.pretrained and data and data.image_shape and "in_chans" not in saved:
        chosen["in_chans"] = data.image_shape[0]
    size = tuple((config.get("input_size") or (3, 224, 224))[1:])
    asked = data.image_size if data else None
    if asked and config.get("fixed_input_size") and size != (asked, asked):
        chosen["img_size"] = asked
    return {key: value for key, value in chosen.items() if key not in section.kwargs}


def _create(
    section: ModelSection, name: str, *, overlay: dict[str, Any], weights: bool, **kwargs: Any
) -> "nn.Module":
    pretrained = section.pretrained and weights
    create = partial(timm.create_model, name, pretrained=pretrained, **kwargs)
    if overlay:
        create = partial(create, pretrained_cfg_overlay=overlay)
    try:
        if not weights:
            try:
                with torch.device("meta"):
                    return create()
            except (RuntimeError, NotImplementedError):  # code that reads values while it builds
                return create()
        if pretrained and not overlay.get("state_dict") and not name.startswith("local-dir:"):
            with reaching_hub("model", section.id):
                return create()
        return create()
    except _ERRORS as error:
        message = " ".join(str(error).split())[:600] or type(error).__name__
        raise ModelError(
            f"model: timm cannot build {section.id!r} with {kwargs}: {message}"
        ) from error


def _origin(section: ModelSection, model: Any, file: object) -> Origin:
    path = Path(section.id.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        return origin_of_folder(path)
    hub_id = str(model.pretrained_cfg.get("hf_hub_id") or "").split("@")[0]
    if not section.pretrained or file is not None or not hub_id:
        return Origin()
    return origin_on_hub(hub_id, section.revision)


def _processor(
    section: ModelSection, model: Any, kwargs: dict[str, Any], data: DataInfo | None
) -> ImageProcessing:
    config = model.pretrained_cfg
    shape: Any = (
        getattr(model, "in_chans", None) or config["input_size"][0],
        *config["input_size"][1:],
    )
    small = data.image_shape if data else None
    if asked := (data.image_size if data else None) or kwargs.get("img_size"):
        shape = (shape[0], *((asked, asked) if isinstance(asked, int) else asked))
    elif small and not section.pretrained and not config.get("fixed_input_size"):
        shape = _fitting(model, (shape[0], *small[1:]), shape)
    mean, std = config.get("mean", IMAGENET_DEFAULT_MEAN), config.get("std", IMAGENET_DEFAULT_STD)
    if not section.pretrained and data and data.mean and data.std:
        mean, std = data.mean, data.std
    names = config.get("label_names")
    order = (
        label_order(data.class_names, names) if data and isinstance(names, list | tuple) else None
    )
    interpolation = config.get("interpolation") or "bilinear"
    mean, std = per_channel(mean, shape[0]), per_channel(std, shape[0])
    return ImageProcessing(
        shape=shape,
        mean=mean,
        std=std,
        interpolation=interpolation if interpolation in ("nearest", "bilinear") else "bicubic",
        key=None,
        transform=partial(
            _transform,
            input_size=shape,
            mean=mean,
            std=std,
            interpolation=interpolation,
            crop_pct=config.get("crop_pct"),
        ),
        label_order=order,
    )


def _fitting(
    model: "nn.Module", wanted: tuple[int, ...], usual: tuple[int, ...]
) -> tuple[int, ...]:
    """The size of the data, or the model's usual one where images of that size vanish in it."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *wanted))
    except (RuntimeError, ValueError, AssertionError):
        log.info("images of %s are too small for the model; they are enlarged to %s", wanted, usual)
        return usual
    return wanted


def _transform(augment: bool, **options: Any) -> "Callable[[Image], Tensor]":
    """The evaluation transform of timm, or a light one for training (half the image, mirrored)."""
    if augment:
        options |= {"scale": (0.5, 1.0), "color_jitter": 0.0, "crop_pct": None}
    return cast("Any", create_transform(is_training=augment, **options))


def _describe_weights(
    model: Any, section: ModelSection, processor: ImageProcessing, labelled: DataInfo | None
) -> None:
    """What a saved checkpoint will say of itself: inputs, classes, and only its own origin."""
    config = dict(model.pretrained_cfg)
    config.pop("state_dict", None)
    if not section.pretrained:
        config |= {key: None for key in _ORIGIN_KEYS if key in config}
    config |= {
        "input_size": processor.shape,
        "mean": processor.mean,
        "std": processor.std,
        "num_classes": model.num_classes,
    }
    if labelled and labelled.class_names:
        config["label_names"] = list(labelled.class_names)
    model.pretrained_cfg = model.default_cfg = config
