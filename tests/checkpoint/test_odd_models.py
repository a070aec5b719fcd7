"""Models whose modules, configs or weights are not where others have them."""

import copy
from collections import OrderedDict

import pytest
import torch
import transformers as tf

import sosp_hub
from sosp_hub.checkpoint.format import proof
from sosp_hub.checkpoint.unregistered import unregistered
from tests.compare import assert_close
from tests.structure.oracles import fill, half, plan_of, run

BACKBONE = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 16],
    "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage4"],
}  # fmt: skip


def mask_transformer():
    """Beside its attention, the model itself reads the number of heads."""
    config = tf.EomtConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
        num_blocks=1, num_queries=5, num_upscale_blocks=1, mlp_ratio=2,
    )  # fmt: skip
    outputs = ("class_queries_logits", "masks_queries_logits")
    return tf.EomtForUniversalSegmentation(config), {"pixel_values": pixels()}, outputs


def detector():
    """The head puts a part of itself into its base model."""
    config = tf.DabDetrConfig(
        backbone_config=BACKBONE, use_timm_backbone=False, backbone=None, hidden_size=32,
        encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=4, decoder_attention_heads=4, num_queries=5,
    )  # fmt: skip
    return tf.DabDetrForObjectDetection(config), {"pixel_values": pixels()}, None


def recurrent():
    """Its code fills weights by the numbers of the config, also where they were loaded."""
    config = tf.RwkvConfig(
        vocab_size=40, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2,
        intermediate_size=48, context_length=16,
    )  # fmt: skip
    return tf.RwkvForCausalLM(config), {"input_ids": tokens(), "use_cache": False}, "logits"


def sparse():
    """A short text makes it run, and be built, otherwise than its config says."""
    config = tf.BigBirdConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=32,
    )  # fmt: skip
    model = tf.BigBirdForMaskedLM(config).eval()
    model(tokens())
    assert "Sparse" not in type(model.bert.encoder.layer[0].attention.self).__name__
    return model, {"input_ids": tokens()}, "logits"


def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tokens():
    return torch.arange(3, 15).reshape(2, 6)


@pytest.mark.slow
@pytest.mark.parametrize("build", [mask_transformer, detector, recurrent, sparse])
def test_it_is_saved_and_loads_again(build, tmp_path):
    torch.manual_seed(0)
    model, inputs, outputs = build()
    graph = sosp_hub.trace(fill(model.eval()), inputs, outputs)
    pruned = sosp_hub.apply(model, graph, half(graph), verify="fast")
    loaded = sosp_hub.from_pretrained(sosp_hub.save_pretrained(pruned, tmp_path / "small"))
    for found, expected in zip(run(loaded, graph), run(pruned, graph), strict=True):
        assert_close(found, expected, relative=1e-6)


def two_towers():
    """The embeddings of its pictures hold the config that counts the layers beside them."""
    tower = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "vocab_size": 40,
    }  # fmt: skip
    config = tf.CLIPConfig(text_config=tower, vision_config=tower, projection_dim=16)
    inputs = {"input_ids": tokens(), "pixel_values": pixels()}
    return tf.CLIPModel(config), inputs, "logits_per_image", "vision_model.encoder.layers"


def of_any_size():
    """Its config says nothing of the size of pictures."""
    config = tf.DetrConfig(
        backbone_config=BACKBONE, use_timm_backbone=False, backbone=None, d_model=32,
        encoder_layers=2, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=4, decoder_attention_heads=4, num_queries=5,
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(2, 3, 64, 64)}
    return tf.DetrForObjectDetection(config), inputs, "logits", "model.encoder.layers"


@pytest.mark.slow
@pytest.mark.parametrize("build", [two_towers, of_any_size])
def test_a_cut_of_layers_alone_is_saved(build, tmp_path):
    """No tensor has another size: the config has to say it."""
    torch.manual_seed(0)
    model, inputs, outputs, stack = build()
    graph = sosp_hub.trace(fill(model.eval()), inputs, outputs)
    plan = plan_of(graph, {f"{stack}:layer": (1,)})
    pruned = sosp_hub.apply(model, graph, plan, verify="fast")
    loaded = sosp_hub.from_pretrained(sosp_hub.save_pretrained(pruned, tmp_path / "small"))
    for found, expected in zip(run(loaded, graph), run(pruned, graph), strict=True):
        assert_close(found, expected, relative=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [{"neuron", "head"}, None])
def test_tables_that_a_class_computes_are_no_missing_weights(kinds, tmp_path):
    """More than half of a tiny Marian are its positions, which transformers does not store."""
    torch.manual_seed(0)
    config = tf.MarianConfig(
        vocab_size=40, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=0,
        decoder_start_token_id=0, max_position_embeddings=1024,
    )  # fmt: skip
    model = tf.MarianMTModel(config).eval()
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(), "use_cache": False}
    graph = sosp_hub.trace(model, inputs, "logits")
    kept = {
        name: kept
        for name, kept in half(graph).kept.items()
        if kinds is None or graph.groups[name].kind in kinds
    }
    pruned = sosp_hub.apply(model, graph, plan_of(graph, kept), verify="fast")
    loaded = sosp_hub.from_pretrained(sosp_hub.save_pretrained(pruned, tmp_path / "small"))
    pruned.save_pretrained(tmp_path / "own")
    loaded.save_pretrained(tmp_path / "again")
    own = [sosp_hub.from_pretrained(tmp_path / name) for name in ("own", "again")]
    for each in (loaded, *own):
        for found, expected in zip(run(each, graph), run(pruned, graph), strict=True):
            assert_close(found, expected, relative=1e-6)


def test_a_rebuilt_model_that_fails_is_not_the_same():
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(4, 2)
    assert proof.same_output(other, model, (torch.ones(1, 3),)) is False


def test_a_module_whose_name_holds_a_hyphen_is_saved(tmp_path):
    """As those of torchvision's RegNet."""

    def build():
        layers = {"block1-0": torch.nn.Linear(6, 16), "act": torch.nn.ReLU()}
        return torch.nn.Sequential(OrderedDict(**layers, head=torch.nn.Linear(16, 3))).eval()

    model, inputs = build(), (torch.randn(2, 6),)
    graph = sosp_hub.trace(model, inputs)
    pruned = sosp_hub.apply(model, graph, half(graph))
    folder = sosp_hub.save_pretrained(pruned, tmp_path / "small")
    loaded = sosp_hub.from_pretrained(folder, model=build())
    assert_close(loaded(*inputs), pruned(*inputs), relative=1e-6)


class Listed(torch.nn.Module):
    """Its own projection is in a plain list; that of ``shared`` is registered beside."""

    def __init__(self, keep=lambda module: [module]):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(6, 16), torch.nn.Linear(16, 3)
        self.registered = torch.nn.Linear(16, 16)
        self.shared = [self.registered]
        self.own = keep(torch.nn.Linear(16, 16))

    def forward(self, x):
        return self.outer(self.own[0](self.shared[0](self.inner(x).relu())))


def test_what_no_file_will_hold_is_told_when_it_is_cut_and_saved(tmp_path, caplog):
    model, inputs = Listed().eval(), (torch.randn(2, 6),)
    graph = sosp_hub.trace(model, inputs)
    for act in (
        lambda: sosp_hub.apply(model, graph, half(graph)),
        lambda: sosp_hub.apply_(copy.deepcopy(model), graph, half(graph)),
        lambda: sosp_hub.save_pretrained(model, tmp_path),
    ):
        caplog.clear()
        act()
        assert "'own[0].weight' and 1 more are not among the parameters" in caplog.text
        assert "nn.ModuleList" in caplog.text


def test_a_list_of_what_is_registered_is_not_told(tmp_path, caplog):
    model = Listed(lambda module: torch.nn.ModuleList([module])).eval()
    sosp_hub.save_pretrained(model, tmp_path)
    assert "nn.ModuleList" not in caplog.text


class Recurrent(torch.nn.Module):
    """Keeps a list of its weights beside the registered ones, as all of torch's do."""

    def __init__(self):
        super().__init__()
        self.memory, self.outer = torch.nn.LSTM(6, 8, batch_first=True), torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.outer(self.memory(x)[0])


def test_weights_of_recurrent_layers_are_registered(tmp_path, caplog):
    """Their list held the dense weights until the next pass, and was told to be in no file."""
    model, inputs = Recurrent().eval(), (torch.randn(2, 4, 6),)
    graph = sosp_hub.trace(model, inputs)
    pruned = sosp_hub.apply(model, graph, half(graph))
    sosp_hub.save_pretrained(pruned, tmp_path)
    loaded = sosp_hub.from_pretrained(tmp_path, model=Recurrent())
    sosp_hub.apply_(model, graph, half(graph))
    for each in (pruned, loaded, model):
        assert each.memory.hidden_size == 4
        assert [*unregistered(each)] == []
    assert "nn.ModuleList" not in caplog.text
