"""What a config builds, without data, and where the weight files disagree with it."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sosp_hub.checkpoint.format import headers
from sosp_hub.checkpoint.format.proof import without_data
from sosp_hub.checkpoint.format.record import library_in
from sosp_hub.compat.torch import parameter_table, put_in, with_marks
from sosp_hub.compat.transformers import as_stored, no_init_weights, tied_names
from sosp_hub.errors import CheckpointError
from sosp_hub.structure.isolation import isolated


def misfits(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, headers.TensorHeader]
) -> Iterator[str]:
    """Where the headers of the weight files are not what the config builds; makes no tensor."""
    is_timm = library_in(config) == "timm"
    with as_checkpoint_error():
        model = build_skeleton(folder, config, is_timm, dense=False)
    yield from faults_of(model, tensors)


def model_class(config: Mapping[str, Any]) -> Any | None:
    """The transformers class that a config names; None where it names none."""
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    cls = (
        getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    )
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    return cls if is_model else None


def build_skeleton(
    folder: Path, config: Mapping[str, Any], is_timm: bool, *, dense: bool
) -> nn.Module:
    """The model, or its skeleton, without data."""
    if is_timm:
        from sosp_hub.checkpoint.timm.load import build_from_folder

        try:
            with torch.device("meta"):
                return build_from_folder(folder, dense=dense)
        except (RuntimeError, NotImplementedError):  # code that reads values while it builds
            return build_from_folder(folder, dense=dense)
    import transformers

    from sosp_hub.checkpoint.transformers.load import build_meta, plain_config

    if (cls := model_class(config)) is None:
        raise CheckpointError("config.json: architectures: no model class of transformers")
    parsed = transformers.AutoConfig.from_pretrained(folder)
    return build_meta(cls, plain_config(parsed) if dense else parsed)


def build_bare(folder: Path, config: Mapping[str, Any], *, is_timm: bool) -> nn.Module:
    """The model whose parameters have no data and whose buffers have, as far as its code allows.

    A delta in the config is applied.
    """
    if is_timm:
        from sosp_hub.checkpoint.timm.load import build_from_folder

        with contextlib.suppress(RuntimeError, NotImplementedError):  # it reads values while built
            with without_data():
                model = build_from_folder(folder)
            if not any(buffer.is_meta for buffer in model.buffers()):  # made on a weight's device
                return model
        return _without_weights(build_from_folder(folder))
    import transformers

    from sosp_hub.checkpoint.transformers.load import build

    if (cls := model_class(config)) is None:
        raise CheckpointError("config.json: architectures: no model class of transformers")
    parsed = transformers.AutoConfig.from_pretrained(folder)
    with isolated(cls), without_data(), no_init_weights():
        return build(cls, parsed)


def _without_weights(model: nn.Module) -> nn.Module:
    """The same model, whose parameters lose their data, and whose buffers keep it."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in [*parameter_table(module).items()]:
            if old is not None:
                if old not in made:
                    made[old] = nn.Parameter(old.detach().to("meta"), old.requires_grad)
                put_in(module, name, with_marks(made[old], old))
    return model


@contextlib.contextmanager
def as_checkpoint_error() -> Iterator[None]:
    """Turns whatever a library raises while it builds from a config into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"config.json: builds no model ({type(error).__name__}: {error})"
        ) from error


def disagreements(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, headers.TensorHeader]
) -> Iterator[str]:
    """``misfits``, but for modules whose weights were quantised."""
    is_timm = library_in(config) == "timm"
    with as_checkpoint_error():
        model = build_skeleton(folder, config, is_timm, dense=False)
    is_packed = not is_timm and packed_by(config)
    yield from faults_of(model, tensors, packed_modules(model, tensors) if is_packed else ())


def packed_by(config: Mapping[str, Any]) -> str | None:
    """What quantised the weights beside a config of transformers; None where nothing did."""
    said = config.get("quantization_config")
    return str(said.get("quant_method", "a library")) if isinstance(said, Mapping) else None


def packed_modules(
    model: nn.Module, tensors: Mapping[str, headers.TensorHeader]
) -> dict[str, list[str]]:
    """Modules of which files of quantised weights hold other tensors than they have, and those."""
    built, modules = as_stored(model), {name for name, _ in model.named_modules()}
    packed: dict[str, list[str]] = {}
    for name in tensors.keys() - built.keys():
        owner = name.rpartition(".")[0]
        while owner and owner not in modules:
            owner = owner.rpartition(".")[0]
        if owner:
            packed.setdefault(owner, []).append(name)
    for name in tensors.keys() & built.keys():
        if (owner := name.rpartition(".")[0]) in packed:
            packed[owner].append(name)
    return packed


def faults_of(
    model: nn.Module,
    tensors: Mapping[str, headers.TensorHeader],
    packed: Collection[str] = (),
) -> Iterator[str]:
    """Tensors that are missing, not expected, or of another shape than the model's.

    Args:
        model: Without data.
        tensors: Headers of the files.
        packed: Modules whose tensors are in another form, and are not compared.
    """
    built = {name: tuple(tensor.shape) for name, tensor in as_stored(model).items()}
    tied = tied_names(model)
    names = built.keys() | tensors.keys()
    for name in sorted(n for n in names if not any(n.startswith(f"{each}.") for each in packed)):
        if name not in tensors:
            if name not in tied:
                yield f"tensor {name!r}: the config builds {list(built[name])}, no file holds it"
        elif name not in built:
            yield f"tensor {name!r}: {tensors[name].file} holds it, the config builds none"
        elif tensors[name].shape != built[name]:
            yield (
                f"tensor {name!r}: {tensors[name].file} holds {list(tensors[name].shape)}, "
                f"the config builds {list(built[name])}"
            )
