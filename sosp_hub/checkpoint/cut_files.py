"""Cuts the weight files of a folder into another folder, without the model in memory.

The model is built without weights. Each tensor is read, cut and written in blocks of rows, so that
what is held does not grow with the model.
"""

import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor, nn

from sosp_hub.checkpoint.format import headers
from sosp_hub.checkpoint.format.folder import replaced_folder
from sosp_hub.checkpoint.format.record import library_in
from sosp_hub.checkpoint.format.weight_files import is_weight_file
from sosp_hub.checkpoint.inputs import inputs_without_weights
from sosp_hub.checkpoint.skeleton import as_checkpoint_error, build_bare
from sosp_hub.compat.transformers import as_stored, tied_names
from sosp_hub.errors import CheckpointError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply, folds
from sosp_hub.surgery.layers import names_after

_BLOCK_BYTES = 64 * 2**20
"""Of a tensor, read at once."""
_LOOKED_AT = 32
"""Tensors that are read again at random and compared."""
_LARGEST_LOOKED_AT = 256 * 2**20
_NOT_COPIED = {headers.CONFIG, headers.INDEX, "README.md"}
_COPIED = {".json", ".txt", ".model", ".jinja"}

_Kept = tuple[Tensor | None, ...]
"""Kept positions of each dimension; None = all."""


@dataclass(frozen=True)
class _Piece:
    """A tensor of the new files: where it comes from, and what of it is kept."""

    source: str
    header: headers.TensorHeader
    kept: _Kept
    scales: tuple[tuple[int, Tensor], ...] = ()
    shift: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(
            size if kept is None else len(kept)
            for size, kept in zip(self.header.shape, self.kept, strict=True)
        )

    @property
    def num_bytes(self) -> int:
        size = prod(self.header.shape)
        return self.header.num_bytes // size * prod(self.shape) if size else 0


def cut_files(
    plan: PruningPlan,
    base: Path,
    out: Path,
    *,
    example_inputs: Any = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Writes what `apply` and `save_pretrained` would, from one folder to another.

    The shapes of every operation of the cut model are compared with the predicted ones, each tensor
    with what config and delta build, and some that are drawn at random are read again; outputs are
    not compared, which needs the weights. Text files beside the weights, such as those of a
    tokenizer, are copied; what is said of the dense model is not.

    Args:
        plan: What is kept.
        base: A folder of transformers or timm, with weights in safetensors files.
        out: Where to; written as a whole or not at all.
        example_inputs: As for `trace`, where no config tells how the inputs look.
        max_shard_size: Size of one weight file.

    Returns:
        ``out``.

    Raises:
        CheckpointError: Damaged files, a model of no library, or tensors that are stored in a way
            that cannot be cut in pieces.
        PlanError: The plan was made for another model.
        VerificationError: The cut model does not run, or gives other shapes than predicted.
        OutputError: The folder cannot be written; what was there stays.
    """
    config = headers.read_json(base / headers.CONFIG)
    tensors = headers.read_tensors(base)
    library = library_in(config)
    if library == "torch":
        raise CheckpointError(
            f"{base}: a model of no library, which only its own code builds; load it with "
            "sosp_hub.from_pretrained(folder, model=...), cut it with sosp_hub.apply and save it"
        )
    if "quantization_config" in config:
        raise CheckpointError(
            f"{base}: its weights are quantised; cut the model that it was made from, and quantise "
            "the result"
        )
    if (base / "adapter_config.json").exists():
        raise CheckpointError(
            f"{base}: holds adapters beside its weights (adapter_config.json); load it, merge them "
            "(model.merge_and_unload()) and cut what that saves, or take the adapter's files away"
        )
    if out.exists() and base.exists() and out.resolve() == base.resolve():
        raise CheckpointError(f"{out}: is the base itself; give another folder")
    with as_checkpoint_error():
        dense = build_bare(base, config, is_timm=library == "timm").eval()
    inputs = inputs_without_weights(dense) if example_inputs is None else example_inputs
    if inputs is None:
        raise CheckpointError(
            f"{type(dense).__name__}: no config tells how its inputs look; pass example_inputs=, "
            "the inputs of one forward pass, as for sosp_hub.trace"
        )
    graph = trace(dense, inputs)
    pruned = apply(dense, graph, plan, "fast", strict=True).eval()
    pieces = dict(_pieces(dense, pruned, graph, plan, tensors))
    with replaced_folder(out) as fresh:
        _copy_beside(base, fresh)
        added = _write_config(pruned, fresh, inputs, library == "timm")
        _check_whole(pieces, added, pruned)
        _write(pieces, added, base, fresh, max_shard_size)
        _look_again(pieces, base, fresh)
    return out


def _write_config(model: nn.Module, folder: Path, inputs: Any, is_timm: bool) -> dict[str, Tensor]:
    """Writes the config, with the delta; what the delta adds to the model's tensors."""
    if is_timm:
        from sosp_hub.checkpoint.timm.save import write_description
    else:
        from sosp_hub.checkpoint.transformers.save import write_description
    return write_description(model, folder, inputs)  # type: ignore[arg-type]


def _pieces(
    dense: nn.Module,
    pruned: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    tensors: Mapping[str, headers.TensorHeader],
) -> Iterator[tuple[str, _Piece]]:
    """The new tensors by name, from those of the files.

    Where a library stores a tensor in parts, or parts as one, masks of what is kept go the way that
    the tensor itself would go.
    """
    main = {alias: name for name, others in graph.aliases.items() for alias in others}
    new_name, folded = names_after(pruned, graph, plan), folds(graph, plan)
    tied, state, small = tied_names(pruned), dense.state_dict(), pruned.state_dict()
    for name, tensor in state.items():
        new, known = new_name(name), main.get(name, name)
        if new is None or (new in tied and name not in tensors):
            continue
        positions = graph.kept_positions(known, plan) if known in graph.tensors else ()
        kept = tuple(None if p is None else torch.as_tensor(p) for p in positions)
        kept = kept or (None,) * tensor.dim()
        scales, shift = folded.get(known, ((), None))
        if new in tied:
            continue
        parts = as_stored(dense, {name: torch.empty_like(tensor, device="meta")})
        if list(parts) == [name]:
            header = _header(name, tuple(tensor.shape), tensors)
            yield new, _Piece(name, header, kept, scales, shift)
            continue
        if scales or shift is not None:
            raise CheckpointError(
                f"tensor {name!r}: the plan folds gates or shifts into it, and it is stored in "
                "parts; cut the model in memory with sosp_hub.apply"
            )
        yield from _stored_parts(dense, pruned, name, new, tensor, small[new], kept, tensors)


def _stored_parts(
    dense: nn.Module,
    pruned: nn.Module,
    name: str,
    new: str,
    tensor: Tensor,
    small: Tensor,
    kept: _Kept,
    tensors: Mapping[str, headers.TensorHeader],
) -> Iterator[tuple[str, _Piece]]:
    """A tensor that is stored in parts, such as the experts of a layer, each by itself."""
    parts = as_stored(dense, {name: torch.empty_like(tensor, device="meta")})
    stays: dict[str, list[Tensor | None] | None] = {
        part: [None] * value.dim() for part, value in parts.items()
    }
    for dim, positions in enumerate(kept):
        if positions is None:
            continue
        mask = torch.zeros(tensor.shape[dim], dtype=torch.bool)
        mask[positions] = True
        shape = [-1 if i == dim else 1 for i in range(tensor.dim())]
        for part, value in as_stored(dense, {name: mask.view(shape).expand(tensor.shape)}).items():
            chosen = stays[part]
            if chosen is None or value.all():
                continue
            if not value.any():
                stays[part] = None  # as an expert that is gone
                continue
            axis = _varies_along(value)
            if axis is None:
                raise CheckpointError(
                    f"tensor {part!r}: is stored in a way that cannot be cut in pieces; cut the "
                    "model in memory with sosp_hub.apply"
                )
            lines = value.movedim(axis, 0).reshape(value.shape[axis], -1)
            chosen[axis] = lines[:, 0].nonzero()[:, 0]
    left = [(part, chosen) for part, chosen in stays.items() if chosen is not None]
    names = as_stored(pruned, {new: torch.empty_like(small, device="meta")})
    if len(left) != len(names):
        raise CheckpointError(
            f"tensor {name!r}: {len(left)} of its stored parts are kept, the cut model has "
            f"{len(names)}; cut the model in memory with sosp_hub.apply"
        )
    for (part, chosen), stored in zip(left, names, strict=True):
        header = _header(part, tuple(parts[part].shape), tensors)
        yield stored, _Piece(part, header, tuple(chosen))


def _varies_along(mask: Tensor) -> int | None:
    """The only dimension along which a mask differs; None where there is no such one."""
    for axis in range(mask.dim()):
        lines = mask.movedim(axis, 0).reshape(mask.shape[axis], -1)
        if bool((lines.all(1) == lines.any(1)).all()):
            return axis
    return None


def _header(
    name: str, shape: tuple[int, ...], tensors: Mapping[str, headers.TensorHeader]
) -> headers.TensorHeader:
    if name not in tensors:
        raise CheckpointError(
            f"tensor {name!r}: the config builds {list(shape)}, no file holds it under this name; "
            "where its class computes it, as Marian its positions, cut the model in memory "
            "(apply_plan_file without out=); else load it with its library, save it again, and cut "
            "that"
        )
    if tensors[name].shape != shape:
        raise CheckpointError(
            f"tensor {name!r}: {tensors[name].file} holds {list(tensors[name].shape)}, the config "
            f"builds {list(shape)}"
        )
    return tensors[name]


def _check_whole(
    pieces: Mapping[str, _Piece], added: Mapping[str, Tensor], pruned: nn.Module
) -> None:
    """Compares names and shapes of what will be written with what the cut model stores."""
    tied = tied_names(pruned)
    bare = {name: torch.empty_like(t, device="meta") for name, t in pruned.state_dict().items()}
    expected = {n: tuple(t.shape) for n, t in as_stored(pruned, bare).items() if n not in tied}
    given = {name: piece.shape for name, piece in pieces.items()}
    for name in sorted(expected.keys() | given.keys()):
        if name not in added and expected.get(name) != given.get(name):
            raise CheckpointError(
                f"tensor {name!r}: the cut model holds {expected.get(name)}, {given.get(name)} "
                "would be written; cut the model in memory with sosp_hub.apply"
            )


def _write(
    pieces: Mapping[str, _Piece],
    added: Mapping[str, Tensor],
    base: Path,
    folder: Path,
    max_shard_size: int | str,
) -> None:
    """Writes all tensors, in files of at most this size, and the index of several."""
    dtypes = {piece.header.dtype: _dtype_of(base, piece) for piece in pieces.values()}
    bare = {
        name: torch.empty(piece.shape, dtype=dtypes[piece.header.dtype], device="meta")
        for name, piece in pieces.items()
    }
    split = split_torch_state_dict_into_shards({**bare, **added}, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            size = _num_bytes(added[name]) if name in added else pieces[name].num_bytes
            shape = added[name].shape if name in added else pieces[name].shape
            code = _CODES[added[name].dtype] if name in added else pieces[name].header.dtype
            entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                if name in added:
                    _put(target, added[name].detach().cpu())
                else:
                    for block in _blocks(pieces[name], base):
                        _put(target, block)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / headers.INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip


def _blocks(piece: _Piece, base: Path) -> Iterator[Tensor]:
    """The kept part of a tensor, some rows at a time, in order."""
    path, shape = base / piece.header.file, piece.header.shape
    if not shape or not prod(shape):
        with safe_open(path, "pt") as file:
            yield file.get_tensor(piece.source)
        return
    rows = max(1, _BLOCK_BYTES // max(piece.header.num_bytes // shape[0], 1))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        # Opened anew for each block: what is mapped of a file counts as memory of this process.
        with safe_open(path, "pt") as file:
            block = file.get_slice(piece.source)[start:stop].clone()
        yield _cut_block(block, piece, start, stop)


def _cut_block(block: Tensor, piece: _Piece, start: int, stop: int) -> Tensor:
    for dim, scale in piece.scales:
        part = scale[start:stop] if dim == 0 else scale
        shape = [-1 if i == dim else 1 for i in range(block.dim())]
        block.mul_(part.to(block).view(shape))
    if piece.shift is not None:
        block.add_(piece.shift[start:stop].to(block))
    for dim, kept in enumerate(piece.kept):
        if kept is None:
            continue
        if dim == 0:
            kept = kept[(kept >= start) & (kept < stop)] - start
        block = block.index_select(dim, kept)
    return block.contiguous()


def _put(file: BinaryIO, tensor: Tensor) -> None:
    if tensor.numel():
        values: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        file.write(memoryview(values))


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _dtype_of(base: Path, piece: _Piece) -> torch.dtype:
    shape = piece.header.shape
    with safe_open(base / piece.header.file, "pt") as file:
        if not shape or not prod(shape):
            return file.get_tensor(piece.source).dtype
        return file.get_slice(piece.source)[0:1].dtype


def _look_again(pieces: Mapping[str, _Piece], base: Path, folder: Path) -> None:
    """Reads tensors, drawn at random, of both folders and compares them."""
    written = headers.read_tensors(folder)
    small = [n for n, each in pieces.items() if each.header.num_bytes <= _LARGEST_LOOKED_AT]
    for name in random.Random(0).sample(sorted(small), min(_LOOKED_AT, len(small))):
        piece = pieces[name]
        with safe_open(base / piece.header.file, "pt") as file:
            expected = file.get_tensor(piece.source).clone()
        for dim, scale in piece.scales:
            shape = [-1 if i == dim else 1 for i in range(expected.dim())]
            expected = expected * scale.to(expected).view(shape)
        if piece.shift is not None:
            expected = expected + piece.shift.to(expected)
        for dim, kept in enumerate(piece.kept):
            expected = expected if kept is None else expected.index_select(dim, kept)
        with safe_open(folder / written[name].file, "pt") as file:
            found = file.get_tensor(name)
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            raise CheckpointError(f"tensor {name!r}: was not written as it was cut; try again")


def _copy_beside(base: Path, folder: Path) -> None:
    """Copies what belongs to a tokenizer or a processor, or says how to generate."""
    for path in _files(base):
        shutil.copyfile(path, folder / path.name)


def _files(base: Path) -> Sequence[Path]:
    with headers.reading(base):
        return [
            path
            for path in sorted(base.iterdir())
            if path.is_file()
            and path.suffix in _COPIED
            and not path.name.startswith("sosp_")
            and path.name not in _NOT_COPIED
            and not is_weight_file(path.name)
        ]
