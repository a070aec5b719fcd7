"""The lines that load a published model, for its library and tier; run before they are printed."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sosp_hub.checkpoint.format.headers import read_tensors
from sosp_hub.checkpoint.format.record import KEY, Builder, library_in
from sosp_hub.errors import CheckpointError, HubError
from sosp_hub.recipe.tasks import Task, find_task, known_task
from sosp_hub.report.markers import quoted
from sosp_hub.untrusted import UnreadableError, read_json

Tier = Literal["native", "delta"]

_LARGEST_SIDE = 16_384  # pixels of an input that a card shows
_REGISTERED_HERE = "cifar_resnet"  # timm knows these networks only once sosp_hub is imported
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Checkpoint:
    """What a folder's own files say about the model in it."""

    folder: Path
    config: dict[str, Any]
    library: Builder
    tier: Tier
    has_tokenizer: bool
    processors: bool = False
    half: bool = False

    @property
    def library_name(self) -> str:
        """What the hub is told: the library whose loader understands the files."""
        return self.library if self.tier == "native" and self.can_run else "sosp_hub"

    @property
    def can_run(self) -> bool:
        """Whether the files alone are enough to build the model."""
        return self.library != "torch"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads ``config.json``.

    Raises:
        HubError: A folder without one, or with one that is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise HubError(
            f"{folder}: there is no config.json, so this is no saved model; "
            "write the folder with sosp_hub.save_pretrained(model, folder)"
        )
    try:
        config = read_json(path)
    except UnreadableError as error:
        raise HubError(f"{path}: {error}; save the model again") from error
    if not isinstance(config, dict):
        raise HubError(f"{path}: expected a JSON object, got {type(config).__name__}")
    library = library_in(config)
    arguments = config.get("model_args")
    delta = "sosp_hub" in config or (isinstance(arguments, dict) and "delta" in arguments)
    delta = delta or str(config.get("architecture")).startswith(_REGISTERED_HERE)
    return Checkpoint(
        folder=folder,
        config=config,
        library=library,
        tier="delta" if delta else "native",
        has_tokenizer=any((folder / name).is_file() for name in _TOKENIZER_FILES),
        processors=any((folder / name).is_file() for name in _PROCESSOR_FILES),
        half=_is_half(folder),
    )


def _is_half(folder: Path) -> bool:
    """Whether weights are in a 16-bit type, so that an input in float32 would not fit."""
    try:
        return any(tensor.dtype in {"F16", "BF16"} for tensor in read_tensors(folder).values())
    except CheckpointError:  # no weights yet, or damaged ones, which running the lines will show
        return False


def load_snippet(checkpoint: Checkpoint, address: str, task: str | None) -> str:
    """Python lines that load the model from ``address`` and run it once."""
    known = known_task(task)
    if known and known.sample and checkpoint.library == "transformers" and checkpoint.processors:
        return _pipeline_lines(checkpoint, address, known)
    imports, load = _loading(checkpoint, address, task)
    use: list[str] = []
    if not checkpoint.can_run:
        return f"import sosp_hub\n\n{load}"
    size = _image_size(checkpoint.config)
    if checkpoint.library == "transformers" and checkpoint.has_tokenizer:
        imports["transformers"] = (*imports.get("transformers", ()), "AutoTokenizer")
        use += [f"tokenizer = AutoTokenizer.from_pretrained({quoted(address)})"]
        use += (known or find_task("text-classification")).use()
    elif size is not None:
        imports["torch"] = ()
        logits = ".logits" if checkpoint.library == "transformers" else ""
        headless = known is not None and known.auto_class == "AutoModel"
        answer = "" if headless else f"{logits}.argmax(-1)"
        shape = ", ".join(map(str, (1, *size)))
        shape += ", dtype=next(model.parameters()).dtype" if checkpoint.half else ""
        use += [f"image = torch.zeros({shape})  # your image goes here"]
        use += [f"print(model(image){answer})"]
    first = [f"import {package}" for package, names in sorted(imports.items()) if not names]
    first += [f"from {p} import {', '.join(names)}" for p, names in imports.items() if names]
    return "\n".join([*first, "", load, *use])


def _pipeline_lines(checkpoint: Checkpoint, address: str, task: Task) -> str:
    *imports, given = task.sample
    named = quoted(task.name)
    return "\n".join(
        [
            *(["import sosp_hub"] if checkpoint.tier == "delta" else []),
            *imports,
            "from transformers import pipeline",
            "",
            f"model = pipeline({named}, {quoted(address)})",
            f"print(model({given}))  # yours goes here",
        ]
    )


def where_it_loads(checkpoint: Checkpoint) -> str:
    """A sentence on what a reader has to install."""
    if not checkpoint.can_run:
        return (
            "It needs `pip install sosp_hub` and the code of its class, of which this repository "
            "holds none: build the model as it was before it was cut, and what loads it gives "
            "another one that is cut and has these weights. Nothing in this repository runs code "
            "from it."
        )
    if checkpoint.tier == "native":
        return (
            f"It loads with {checkpoint.library} alone; `sosp_hub.from_pretrained` works as well. "
            "Nothing in this repository runs code from it."
        )
    return (
        "It needs `pip install sosp_hub`: a plain configuration cannot describe its layers. "
        f"After `import sosp_hub`, {checkpoint.library}'s own loaders read it too. "
        f"Without the package {checkpoint.library} stops with an error. "
        "`python -m sosp_hub.export` writes it for other readers (ONNX, llama.cpp, mlx-lm, ...) "
        "where their formats can hold it. "
        "Nothing in this repository runs code from it."
    )


def run_snippet(snippet: str) -> None:
    """Runs the lines that a card is about to show.

    Raises:
        HubError: They fail; the card would mislead.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(snippet, "<load snippet of the card>", "exec"), {})
    except Exception as error:  # whatever the lines raise is what a reader would see
        raise HubError(
            f"the load snippet of the card does not run: {type(error).__name__}: {error}\n"
            f"The lines were:\n{snippet}"
        ) from error


def _loading(
    checkpoint: Checkpoint, address: str, task: str | None
) -> tuple[dict[str, tuple[str, ...]], str]:
    """Packages with the names to import from them, and the line that loads."""
    if not checkpoint.can_run:
        cls = _class_name(checkpoint.config)
        return {}, (
            f"model = {cls}(...)  # your own class, as it was before it was cut\n"
            f"model = sosp_hub.from_pretrained({quoted(address)}, model=model)"
        )
    if checkpoint.tier == "native" and checkpoint.library == "timm":
        prefix = "local-dir" if Path(address).is_dir() else "hf-hub"
        source = quoted(f"{prefix}:{address}")
        line = f"model = timm.create_model({source}, pretrained=True).eval()"
        return {"timm": ()}, line
    if checkpoint.tier == "native" and (known := known_task(task)) and known.auto_class:
        line = f"model = {known.auto_class}.from_pretrained({quoted(address)}).eval()"
        return {"transformers": (known.auto_class,)}, line
    return {"sosp_hub": ()}, f"model = sosp_hub.from_pretrained({quoted(address)}).eval()"


def _class_name(config: dict[str, Any]) -> str:
    """Of the delta of a model of no library, if it is a name: it becomes a line of Python."""
    base = config[KEY].get("base")
    name = base.get("class") if isinstance(base, dict) else None
    return name if isinstance(name, str) and name.isidentifier() and len(name) < 100 else "Net"


def _image_size(config: dict[str, Any]) -> tuple[int, int, int] | None:
    """Channels, height and width; whole numbers alone, since they become lines that are run."""
    own = config.get("pretrained_cfg")
    size = own.get("input_size") if isinstance(own, dict) else None
    if not isinstance(size, list):
        pixels = config.get("image_size")
        sides = pixels if isinstance(pixels, list) else [pixels, pixels]
        size = [config.get("num_channels", 3), *sides]
    if len(size) == 3 and all(type(side) is int and 0 < side <= _LARGEST_SIDE for side in size):
        return size[0], size[1], size[2]
    return None
