"""Other families than those of make_data: the same rows give them batches, a loss and a metric."""

import pytest
import torch
import transformers

import sosp_hub
from recipes import make_data
from sosp_hub.data.loading import load_split, make_loader
from sosp_hub.data.source import open_data
from sosp_hub.evaluate import evaluate
from sosp_hub.recipe.schema import DataSection, ModelSection
from sosp_hub.recipe.tasks import find_task
from sosp_hub.zoo.load import example_inputs, load_model
from tests.tasks.made import CASES, SIDE, make

pytestmark = pytest.mark.slow
SIZE = {"height": SIDE, "width": SIDE}
SMALL = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
WIDE = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}


def detr():
    backbone = transformers.ResNetConfig(**RESNET, out_features=["stage4"])
    config = transformers.DetrConfig(
        backbone_config=backbone, num_queries=5, num_labels=10, **SMALL, **HEADS, **WIDE
    )
    return transformers.DetrForObjectDetection(config), transformers.DetrImageProcessor(size=SIZE)


def rt_detr():
    stages = ["stage2", "stage3", "stage4"]
    backbone = transformers.RTDetrResNetConfig(**RESNET, out_features=stages)
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[16, 16, 16],
        decoder_in_channels=[16, 16, 16],
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=8,
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_n_points=2,
        num_denoising=0,
        num_labels=10,
    )
    own = transformers.RTDetrImageProcessor(size={"height": 64, "width": 64})
    return transformers.RTDetrForObjectDetection(config), own


def upernet():
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=8,
        pool_scales=[1, 2],
        auxiliary_channels=8,
        auxiliary_in_channels=16,
        num_labels=11,
    )
    own = transformers.SegformerImageProcessor(size={"height": 64, "width": 64})
    return transformers.UperNetForSemanticSegmentation(config), own


def dpt():
    config = transformers.DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=64,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
    )
    own = transformers.DPTImageProcessor(size={"height": 64, "width": 64})
    return transformers.DPTForDepthEstimation(config), own


def siglip():
    tokenizer = make_data.word_tokenizer(make_data.CAPTION_WORDS)
    tokenizer.model_max_length = 16
    config = transformers.SiglipConfig(
        text_config={
            **make_data.VIT,
            "num_hidden_layers": 1,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
        },
        vision_config={
            **make_data.VIT,
            "num_hidden_layers": 1,
            "image_size": SIDE,
            "patch_size": 8,
        },
    )
    images = transformers.SiglipImageProcessor(size=SIZE)
    own = transformers.SiglipProcessor(images, tokenizer)
    return transformers.SiglipModel(config), own


def bart():
    sentences = make_data.brown(None)
    tokenizer = make_data.word_tokenizer(sorted({w for s in sentences for p in s for w in p}))
    config = transformers.BartConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=3,
        **SMALL,
        **HEADS,
        **WIDE,
    )
    return transformers.BartForConditionalGeneration(config), tokenizer


def marian():
    _, tokenizer = bart()
    config = transformers.MarianConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
        forced_eos_token_id=3,
        **SMALL,
        **HEADS,
        **WIDE,
    )
    return transformers.MarianMTModel(config), tokenizer


def series():
    config = transformers.TimeSeriesTransformerConfig(
        prediction_length=12,
        context_length=24,
        lags_sequence=[1, 2, 3],
        num_time_features=1,
        **SMALL,
        **HEADS,
        **WIDE,
    )
    return transformers.TimeSeriesTransformerForPrediction(config), None


def ast():
    config = transformers.ASTConfig(
        **make_data.VIT,
        patch_size=16,
        frequency_stride=16,
        time_stride=16,
        max_length=64,
        num_mel_bins=32,
        num_labels=4,
    )
    own = transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=64)
    return transformers.ASTForAudioClassification(config), own


FAMILIES = {
    "DETR": ("object-detection", detr),
    "RT-DETR": ("object-detection", rt_detr),
    "UperNet": ("image-segmentation", upernet),
    "DPT": ("depth-estimation", dpt),
    "SigLIP": ("zero-shot-image-classification", siglip),
    "BART": ("text2text-generation", bart),
    "Marian": ("text2text-generation", marian),
    "TimeSeriesTransformer": ("time-series-forecasting", series),
    "AST": ("audio-classification", ast),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_do_the_same_tasks(tmp_path, name):
    key, build = FAMILIES[name]
    folder = make(CASES[key], tmp_path)
    torch.manual_seed(0)
    model, own = build()
    model.save_pretrained(tmp_path / "other")
    if own is not None:
        own.save_pretrained(tmp_path / "other")
    task = find_task(key)
    data = open_data(DataSection(path=str(folder / "data"), max_length=32), key)
    section = ModelSection(library="transformers", id=str(tmp_path / "other"), task=key)
    loaded = load_model(section, data=data.info)
    train = load_split(data, "train", loaded.processor)
    batches = [train.__getitems__([0, 1]), train.__getitems__([2, 3])]
    loss_fn = task.loss_fn(loaded.model)
    graph = sosp_hub.trace(loaded.model, example_inputs(loaded), outputs=task.outputs)
    kinds = [k for k in ("head", "neuron") if any(g.kind == k for g in graph.groups.values())]
    for criterion in ("sosp_h", "sosp_i", "taylor"):
        saliency = sosp_hub.score(
            loaded.model, graph, batches, criterion, kinds=kinds or None, loss_fn=loss_fn
        )
        assert any(scores.any() for scores in saliency.values())
    plan = sosp_hub.allocate(graph, saliency, structures=0.7)
    pruned = sosp_hub.apply(loaded.model, graph, plan)
    test = make_loader(load_split(data, "test", loaded.processor), 4)
    meters = task.meters(data.info, loaded.processor)
    names = [metric for metric in task.metrics if metric != "per_class_accuracy"]
    measured = evaluate(pruned, test, names, loss_fn=task.loss_fn(pruned), meters=meters)
    assert set(measured) == set(names)
