"""Smoke tests of `sosp_hub.compat.timm`, on timm's own test models."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_model

from sosp_hub.compat import timm as compat
from sosp_hub.compat.smoke import expect, smoke

_MODEL = "test_vit2"


@smoke("loading pruned timm models, and those in several files")
def loading_steps() -> None:
    seen: list[str] = []

    def watched(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return args[0] if name == compat.ADAPT else own(*args, **kwargs)

        return step

    names = (compat.ADAPT, compat.READ_FOLDER, compat.READ_HUB)
    originals = {name: compat.get_step(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        model = timm.create_model(_MODEL)
        compat.write_config(model, Path(folder) / "config.json")
        save_model(model, str(Path(folder) / "model.safetensors"))
        for name, own in originals.items():
            compat.set_step(name, watched(name, own))
        try:
            timm.create_model(f"local-dir:{folder}", pretrained=True, pruned=True)
        finally:
            for name, own in originals.items():
                compat.set_step(name, own)
    expect(seen == [compat.ADAPT, compat.READ_FOLDER], f"timm's steps are {seen}")


@smoke("saving and loading timm models: their config")
def config_files() -> None:
    model = timm.create_model(_MODEL, num_classes=3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        compat.write_config(model, path)
        config = json.loads(path.read_text())
        cfg, name, args = compat.read_config(Path(folder))
    expect(config.get("architecture") == name == _MODEL, f"the architecture is {name!r}")
    expect(config.get("num_classes") == cfg.get("num_classes") == 3, "the classes moved")
    expect(isinstance(args, dict), f"arguments are a {type(args).__name__}")


@smoke("the arguments that rebuild a timm model")
def arguments_of_a_model() -> None:
    args = compat.built_with(timm.create_model(_MODEL, in_chans=2, img_size=64))
    expect(args.get("img_size") in (64, (64, 64), [64, 64]), f"built with {args}")


@smoke("switching the hooks off")
def architectures() -> None:
    def sosp_hub_smoke_test(pretrained: bool = False, **_: Any) -> None:
        """Nothing that could be built."""

    sosp_hub_smoke_test.__module__ = "timm.models.vision_transformer"
    name = sosp_hub_smoke_test.__name__
    try:
        timm.models.register_model(sosp_hub_smoke_test)
        expect(timm.is_model(name), "it was not registered")
    finally:
        compat.forget_architecture(name)
    expect(not timm.is_model(name), "it is still registered")


@smoke("timm models in several files on the hub")
def hub_ids() -> None:
    given = tuple(compat.split_id("me/model@v1"))
    expect(given == ("me/model", "v1"), f"repository and revision are {given}")


@smoke("timm's own ways of saving a cut model")
def config_writers() -> None:
    own, seen = compat.get_config_writer(), []

    def watched(model: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(path)
        own(model, path, *args, **kwargs)

    compat.set_config_writer(watched)
    try:
        with tempfile.TemporaryDirectory() as folder:
            timm.models.save_for_hf(timm.create_model(_MODEL), folder, safe_serialization=True)
            expect([Path(path).name for path in seen] == ["config.json"], f"it wrote {seen}")
            expect((Path(folder) / "model.safetensors").is_file(), "it wrote no weights")
    finally:
        compat.set_config_writer(own)


@smoke("saving models that timm made with features_only")
def models_of_features() -> None:
    for name in (_MODEL, "test_vit"):
        expect(compat.is_whole(timm.create_model(name)), f"{name} is not built by its name")
        features = timm.create_model(name, features_only=True)
        expect(not compat.is_whole(features), f"a {type(features).__name__} is taken for {name}")
