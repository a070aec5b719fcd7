"""What a checkpoint holds, from its config and the headers of its weight files alone."""

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sosp_hub.checkpoint.fake import to_fake
from sosp_hub.checkpoint.format import headers
from sosp_hub.checkpoint.format.bounds import check_code, check_counts
from sosp_hub.checkpoint.format.record import KEY, Delta, library_in
from sosp_hub.checkpoint.format.schema import parse_delta
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.checkpoint.io import fetch
from sosp_hub.checkpoint.skeleton import (
    as_checkpoint_error,
    build_skeleton,
    faults_of,
    packed_by,
    packed_modules,
)
from sosp_hub.checkpoint.torch.read import cut_without_data, misfits, stray
from sosp_hub.checkpoint.weightless import holds_only_a_plan
from sosp_hub.compat.torch import FakeMode, grouped_product_flops, parameter_table
from sosp_hub.compat.transformers import tied_names
from sosp_hub.data.reach import only_cached
from sosp_hub.errors import CheckpointError, HubError, shortened
from sosp_hub.inspection.readers import Reader, readers
from sosp_hub.structure.inputs import num_samples, one_sample
from sosp_hub.structure.isolation import isolated

_TOKENS = 128  # of the text that costs are counted for, as far as a model has positions


@dataclass(frozen=True)
class Layer:
    """One module with weights.

    Attributes:
        name: Its name in the model.
        kind: Its class.
        shape: Shape of its largest tensor.
        dense_shape: Shape before pruning; None where the skeleton is not known.
        params: Number of its parameters.
        macs: Multiply-accumulates for one sample; None where the model could not be followed.
        bytes: Its share of the weight files; 0 for what is tied to another module.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dense_shape: tuple[int, ...] | None
    params: int
    macs: int | None
    bytes: int


@dataclass
class Findings:
    """All that `examine` found.

    Attributes:
        source: Folder or hub id.
        tier: Whether a plain config says all.
        library: Who builds the model.
        architecture: Model class, or timm architecture.
        sample: How large the one sample is that ``macs`` are for, such as ``128 tokens``.
        totals: ``params``, ``macs``, ``bytes``; ``dense_params`` and ``dense_macs`` where known.
        faults: Where config, delta and weights disagree.
        packed: Modules whose weights are quantised, and were not compared with the config.
        readers: Who else loads it.
        layers: Modules with weights.
    """

    source: str
    tier: Literal["native", "delta", "weightless"]
    library: str = ""
    architecture: str = ""
    sample: str = ""
    totals: dict[str, int | None] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)


def examine(
    path_or_id: str | Path, *, revision: str | None = None, model: nn.Module | None = None
) -> Findings:
    """Reads the config and the headers of the weights; of a hub model nothing else is fetched.

    Args:
        path_or_id: Folder or hub id.
        revision: Commit, branch or tag.
        model: What was cut, as it is built, for a model of no library: without it only what the
            files say themselves is known of one.

    Raises:
        CheckpointError: No checkpoint, a config that builds nothing, or another model.
        HubError: The hub cannot be reached, or has no such model.
    """
    folder = headers.local_folder(path_or_id)
    if folder is None and only_cached():
        folder = fetch(path_or_id, {"revision": revision})
    if folder is not None:
        if holds_only_a_plan(folder):
            return Findings(str(path_or_id), "weightless")
        return _examine(str(path_or_id), folder, headers.read_tensors(folder), model)
    with tempfile.TemporaryDirectory() as temporary:
        tensors = _fetch(str(path_or_id), revision, Path(temporary))
        return _examine(str(path_or_id), Path(temporary), tensors, model)


def _examine(
    source: str,
    folder: Path,
    tensors: Mapping[str, headers.TensorHeader],
    built: nn.Module | None,
) -> Findings:
    config = headers.read_json(folder / headers.CONFIG)
    if library_in(config) == "torch":
        return _examine_plain(source, parse_delta(config[KEY]), tensors, built)
    check_counts(config, tensors)
    check_code(config)
    is_timm = library_in(config) == "timm"
    args = config.get("model_args")
    record = config.get(KEY) if not is_timm else isinstance(args, Mapping) and args.get("delta")
    delta = parse_delta(record) if record else None
    with as_checkpoint_error():
        model = build_skeleton(folder, config, is_timm, dense=False).eval()
        dense = build_skeleton(folder, config, is_timm, dense=True).eval() if delta else None
    sample, macs, obstacle = _count_macs(model)
    dense_macs = _count_macs(dense)[1] if dense is not None else {}
    findings = Findings(
        source,
        "delta" if delta else "native",
        "timm" if is_timm else "transformers",
        type(model).__name__,
        sample,
    )
    packer = None if is_timm else packed_by(config)
    packed = packed_modules(model, tensors) if packer else {}
    findings.faults, findings.packed = list(faults_of(model, tensors, packed)), sorted(packed)
    findings.layers = list(_layers(model, dense, tensors, macs, packed))
    findings.totals = {
        "params": _num_params(model),
        "macs": macs.get(""),
        "bytes": sum(each.num_bytes for each in tensors.values()),
    }
    if dense is not None:
        findings.totals |= {"dense_params": _num_params(dense), "dense_macs": dense_macs.get("")}
    findings.readers = list(
        readers(
            model,
            dense,
            library="timm" if is_timm else "transformers",
            num_bytes=findings.totals["bytes"] or 0,
            obstacle=obstacle,
        )
    )
    if packer:
        why = f"the weights are quantised ({packer}); export the model that was quantised"
        findings.readers = [
            dataclasses.replace(each, loads=False, why=why)
            if each.target or each.name.startswith("GGUF")
            else each
            for each in findings.readers
        ]
    return findings


def _examine_plain(
    source: str,
    delta: Delta,
    tensors: Mapping[str, headers.TensorHeader],
    built: nn.Module | None,
) -> Findings:
    """A model whose code the reader has: from the headers alone, or with what the reader built."""
    found = Findings(source, "native" if delta.empty else "delta", "torch", delta.base.cls)
    found.totals = {"params": None, "bytes": sum(each.num_bytes for each in tensors.values())}
    line = f"sosp_hub.from_pretrained(folder, model={delta.base.cls}(...)), with the class at hand"
    found.readers = [Reader("torch", None, line)]
    if built is None:
        found.faults = list(stray(delta, tensors))
        found.layers = list(_files_layers(tensors))
        return found
    dense, model = cut_without_data(built, delta)
    found.faults = list(misfits(model, tensors))
    found.layers = list(_layers(model, dense, tensors, {}))
    found.totals |= {"params": _num_params(model), "dense_params": _num_params(dense)}
    return found


def _files_layers(tensors: Mapping[str, headers.TensorHeader]) -> Iterator[Layer]:
    """Modules by the names of their tensors; buffers count as parameters do."""
    modules: dict[str, dict[str, headers.TensorHeader]] = {}
    for name, tensor in tensors.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = tensor
    for name, own in modules.items():
        sizes = {key: math.prod(each.shape) for key, each in own.items()}
        largest = max(sizes, key=lambda key: sizes[key])
        num_bytes = sum(each.num_bytes for each in own.values())
        shape = own[largest].shape
        yield Layer(name, "", shape, None, sum(sizes.values()), None, num_bytes)


def _count_macs(model: nn.Module) -> tuple[str, dict[str, int], str | None]:
    """Shapes of one sample, multiply-accumulates for it by module, and why there are none.

    ``""`` is the whole model.
    """
    with isolated(model), FakeMode():
        return _count_fake_macs(to_fake(model))


def _count_fake_macs(model: nn.Module) -> tuple[str, dict[str, int], str | None]:
    inputs = made_up_inputs(model, num_tokens=_TOKENS)
    if inputs is None:
        return "", {}, "its config does not say how its inputs look"
    sizes, batch = one_sample(inputs), num_samples(inputs)
    try:
        counter = FlopCounterMode(display=False, custom_mapping=grouped_product_flops())
        with counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention is not counted
            model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    except Exception as error:  # noqa: BLE001 - code that reads values
        (line, *_) = str(error).strip().splitlines() or [""]
        return sizes, {}, f"{type(error).__name__}: {line}"
    root = type(model).__name__
    macs = {
        name.removeprefix(root).removeprefix("."): sum(flops.values()) // (2 * batch)
        for name, flops in counter.get_flop_counts().items()
        if name != "Global"
    }
    macs[""] = sum(counter.get_flop_counts()["Global"].values()) // (2 * batch)
    return sizes, macs, None


def _layers(
    model: nn.Module,
    dense: nn.Module | None,
    tensors: Mapping[str, headers.TensorHeader],
    macs: Mapping[str, int],
    packed: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Iterator[Layer]:
    before = {} if dense is None else {name: tuple(p.shape) for name, p in dense.named_parameters()}
    tied = tied_names(model)
    num_values = sum(math.prod(each.shape) for each in tensors.values())
    # Bytes of a value, for tensors that the file has under another name.
    item = sum(each.num_bytes for each in tensors.values()) / max(num_values, 1)
    for name, module in model.named_modules():
        own = {key: p for key, p in parameter_table(module).items() if p is not None and p.numel()}
        if not own:
            continue
        full = {f"{name}.{key}".lstrip("."): p for key, p in own.items()}
        largest = max(full, key=lambda key: full[key].numel())
        yield Layer(
            name,
            type(module).__name__,
            tuple(full[largest].shape),
            before.get(largest),
            sum(p.numel() for p in full.values()),
            macs.get(name, 0) if macs else None,
            sum(tensors[key].num_bytes for key in packed[name])
            if name in packed
            else sum(
                tensors[key].num_bytes if key in tensors else round(p.numel() * item)
                for key, p in full.items()
                if key not in tied
            ),
        )


def _num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _fetch(repo_id: str, revision: str | None, folder: Path) -> dict[str, headers.TensorHeader]:
    """Puts the config of a hub model into a folder; headers of its weights by range requests."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError

    from sosp_hub.compat.huggingface_hub import transport_error

    try:
        path = hf_hub_download(repo_id, headers.CONFIG, revision=revision)
        (folder / headers.CONFIG).write_bytes(Path(path).read_bytes())
        metadata = get_safetensors_metadata(repo_id, revision=revision)
    except HFValidationError as error:
        raise CheckpointError(
            f"{shortened(str(repo_id))}: no such folder, and no hub id either"
        ) from error
    except NotASafetensorsRepoError as error:
        raise CheckpointError(f"{repo_id}: holds no safetensors weights") from error
    except (HfHubHTTPError, OSError, transport_error()) as error:
        raise HubError(
            f"{repo_id}: no such folder here, and the hub does not give it ({error})"
        ) from error
    tensors = {}
    for file, contents in metadata.files_metadata.items():
        for name, info in contents.tensors.items():
            start, end = info.data_offsets
            shape = tuple(info.shape)
            if end - start < 0 or math.prod(shape) < 0:
                raise CheckpointError(f"{file}: tensor {name!r}: negative size")
            tensors[name] = headers.TensorHeader(info.dtype, shape, end - start, file)
    return tensors
