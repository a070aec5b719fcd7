"""Small models of many families, each with a cut by hand that differs from layer to layer."""

import copy

import timm
import torch
import transformers as tf
from torch import nn
from transformers.pytorch_utils import Conv1D

import sosp_hub
from sosp_hub.plan import PruningPlan

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TEXT = {**TINY, "vocab_size": 96}
GQA = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def keep(module, *, out=None, inp=None):
    """Cuts the rows and columns of a linear layer or convolution, attributes included."""
    for axis, kept in ((0, out), (1, inp)):
        if kept is None:
            continue
        dim = 1 - axis if isinstance(module, Conv1D) else axis
        module.weight = nn.Parameter(module.weight.detach().index_select(dim, kept).clone())
        if axis == 0 and module.bias is not None:
            module.bias = nn.Parameter(module.bias.detach()[kept].clone())
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    else:
        module.out_channels, module.in_channels = module.weight.shape[:2]


def keep_norm(norm, kept):
    """Cuts a batch normalisation."""
    for name in ("weight", "bias"):
        setattr(norm, name, nn.Parameter(getattr(norm, name).detach()[kept].clone()))
    for name in ("running_mean", "running_var"):
        setattr(norm, name, getattr(norm, name)[kept].clone())
    norm.num_features = len(kept)


def some(size, share, seed=0):
    """Sorted indices of a share of a size."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, int(size * share))].sort().values


def mlp(module, ins, out, *, share, attribute=None):
    """Cuts the neurons between the layers `ins` and the layer `out` of one module."""
    kept = some(
        getattr(module, out).weight.shape[0 if isinstance(getattr(module, out), Conv1D) else 1],
        share,
    )
    for name in ins:
        keep(getattr(module, name), out=kept)
    keep(getattr(module, out), inp=kept)
    if attribute:
        setattr(module, attribute, len(kept))


def own_config(module, **values):
    """Gives a module its own copy of the config with other values."""
    module.config = copy.copy(module.config)
    for key, value in values.items():
        setattr(module.config, key, value)


def gated(model):
    """Neurons of every gated MLP, other numbers in each layer; a KV group of the middle layer."""
    layers = model.model.layers
    for i, layer in enumerate(layers):
        mlp(
            layer.mlp,
            ["gate_proj", "up_proj"],
            "down_proj",
            share=1 - 0.2 * (i + 1),
            attribute="intermediate_size",
        )
    heads(layers[1].self_attn)


def heads(attn, head_dim=8):
    """Keeps the second KV group of two, with its two query heads."""
    query, kv = torch.arange(2 * head_dim, 4 * head_dim), torch.arange(head_dim, 2 * head_dim)
    for name, kept in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
        keep(getattr(attn, name), out=kept)
    keep(attn.o_proj, inp=query)
    own_config(attn, num_attention_heads=2, num_key_value_heads=1)
    for name, value in (("num_heads", 2), ("num_attention_heads", 2), ("num_key_value_heads", 1)):
        if isinstance(getattr(attn, name, None), int):
            setattr(attn, name, value)


def each(path, ins, out, attribute=None):
    """A cut of the same MLP in every module of a list, with another share in each."""

    def cut(model):
        for i, layer in enumerate(model.get_submodule(path)):
            ahead = out.rpartition(".")[0]
            kept = some(_width(layer.get_submodule(out)), 1 - 0.2 * (i + 1))
            for each_in in ins:
                keep(layer.get_submodule(each_in), out=kept)
            keep(layer.get_submodule(out), inp=kept)
            if attribute:
                setattr(layer.get_submodule(ahead), attribute, len(kept))

    return cut


def _width(module):
    return module.weight.shape[0 if isinstance(module, Conv1D) else 1]


def phi3(model):
    """The fused gate and up projection: two halves."""
    for i, layer in enumerate(model.model.layers):
        kept = some(48, 1 - 0.2 * (i + 1))
        keep(layer.mlp.gate_up_proj, out=torch.cat([kept, kept + 48]))
        keep(layer.mlp.down_proj, inp=kept)


def t5(model):
    """Encoder and decoder blocks."""
    for stack, at in ((model.encoder, 1), (model.decoder, 2)):
        for i, block in enumerate(stack.block):
            mlp(block.layer[at].DenseReluDense, ["wi"], "wo", share=1 - 0.2 * (i + 1))


def mixtral(model):
    """Neurons of all experts of a layer: tensors of three dimensions, no linear layers."""
    for i, layer in enumerate(model.model.layers):
        experts, kept = (
            layer.mlp.experts,
            torch.arange(4 * i, 40 - 4 * i),
        )  # grouped products want multiples of 4
        experts.gate_up_proj = nn.Parameter(
            experts.gate_up_proj.detach()[:, torch.cat([kept, kept + 48])].clone()
        )
        experts.down_proj = nn.Parameter(experts.down_proj.detach()[:, :, kept].clone())
        experts.intermediate_dim = len(kept)


def bert_head(model):
    """Neurons and, in the first layer, one head of four."""
    each("bert.encoder.layer", ["intermediate.dense"], "output.dense")(model)
    attention = model.bert.encoder.layer[0].attention
    for name in ("query", "key", "value"):
        keep(getattr(attention.self, name), out=torch.arange(8, 32))
    keep(attention.output.dense, inp=torch.arange(8, 32))
    attention.self.num_attention_heads, attention.self.all_head_size = 3, 24


def mamba(model):
    """Inner channels of the mixer."""
    for i, layer in enumerate(model.backbone.layers):
        mixer, kept = layer.mixer, some(64, 1 - 0.2 * (i + 1))
        keep(mixer.in_proj, out=torch.cat([kept, kept + 64]))
        keep(mixer.conv1d, out=kept)
        mixer.conv1d.in_channels = mixer.conv1d.groups = len(kept)
        keep(mixer.x_proj, inp=kept)
        keep(mixer.dt_proj, out=kept)
        keep(mixer.out_proj, inp=kept)
        mixer.A_log = nn.Parameter(mixer.A_log.detach()[kept].clone())
        mixer.D = nn.Parameter(mixer.D.detach()[kept].clone())
        mixer.intermediate_size = len(kept)


def clip(model):
    """Both towers."""
    each("vision_model.encoder.layers", ["mlp.fc1"], "mlp.fc2")(model)
    each("text_model.encoder.layers", ["mlp.fc1"], "mlp.fc2")(model)


VISION = {**TINY, "image_size": 32, "patch_size": 8}
FC = (["fc1"], "fc2")

FAMILIES = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**GQA), gated),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**GQA), gated),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**{**GQA, "tie_word_embeddings": True}), gated),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**GQA), gated),
    "gemma": (tf.GemmaForCausalLM, tf.GemmaConfig(**GQA), gated),
    "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config(**GQA), gated),
    "phi3": (tf.Phi3ForCausalLM, tf.Phi3Config(**{**TEXT, "pad_token_id": 0}), phi3),
    "gpt2": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=96, n_positions=64),
        each("transformer.h", ["mlp.c_fc"], "mlp.c_proj"),
    ),
    "opt": (
        tf.OPTForCausalLM,
        tf.OPTConfig(**TEXT, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
        each("model.decoder.layers", *FC),
    ),
    "bert": (tf.BertForSequenceClassification, tf.BertConfig(**TEXT, num_labels=3), bert_head),
    "roberta": (
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig(**TEXT),
        each("roberta.encoder.layer", ["intermediate.dense"], "output.dense"),
    ),
    "distilbert": (
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=3, n_heads=4, vocab_size=96),
        each("distilbert.transformer.layer", ["ffn.lin1"], "ffn.lin2"),
    ),
    "t5": (
        tf.T5ForConditionalGeneration,
        tf.T5Config(
            d_model=32, d_ff=48, d_kv=8, num_layers=3, num_heads=4, vocab_size=96,
            decoder_start_token_id=0,
        ),
        t5,
    ),
    "whisper": (
        tf.WhisperForConditionalGeneration,
        tf.WhisperConfig(
            d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=96,
            num_mel_bins=8, max_source_positions=20, max_target_positions=32,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
        each("model.encoder.layers", *FC),
    ),
    "vit": (
        tf.ViTForImageClassification,
        tf.ViTConfig(**VISION, num_labels=3),
        None,
    ),
    "dinov2": (tf.Dinov2ForImageClassification, tf.Dinov2Config(**VISION, mlp_ratio=2), None),
    "clip": (
        tf.CLIPModel,
        tf.CLIPConfig(
            text_config={**TEXT, "max_position_embeddings": 32, "projection_dim": 16},
            vision_config={**VISION, "projection_dim": 16},
            projection_dim=16,
        ),
        clip,
    ),
    "mixtral": (
        tf.MixtralForCausalLM,
        tf.MixtralConfig(**GQA, num_local_experts=3, num_experts_per_tok=2),
        mixtral,
    ),
    "mamba": (
        tf.MambaForCausalLM,
        tf.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=3, vocab_size=96),
        mamba,
    ),
}  # fmt: skip


def _vit(prefix, first, second):
    return each(prefix, [first], second)


def _find(model, *paths):
    for path in paths:
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    raise AssertionError(paths)


def pruned(family):
    """A model of a family in eval mode, cut by hand."""
    cls, config, cut = FAMILIES[family]
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config)).eval()
    if family == "vit":
        path = _find(model, "vit.encoder.layer", "vit.layers")
        first = "mlp.fc1" if hasattr(model.get_submodule(path)[0], "mlp") else "intermediate.dense"
        cut = each(path, [first], "mlp.fc2" if first == "mlp.fc1" else "output.dense")
    if family == "dinov2":
        cut = each(_find(model, "dinov2.encoder.layer", "dinov2.layers"), ["mlp.fc1"], "mlp.fc2")
    cut(model)
    return model


def mistral_without_window():
    """Whose attention sees all earlier tokens, as readers without windows need it."""
    model = pruned("mistral")
    model.config.sliding_window = None
    return model


# -------------------------------------------------------------------------------------------- timm


def timm_resnet(model):
    """Inner channels of every basic or bottleneck block."""
    for i, stage in enumerate((model.layer1, model.layer2, model.layer3, model.layer4)):
        for block in stage:
            kept = some(block.conv1.out_channels, 1 - 0.2 * i, seed=i)
            keep(block.conv1, out=kept)
            keep_norm(block.bn1, kept)
            keep(block.conv2, inp=kept)


def timm_mlp(model):
    """Neurons of every MLP with fc1 and fc2."""
    found = [
        m
        for m in model.modules()
        if hasattr(m, "fc1") and hasattr(m, "fc2") and not isinstance(m.fc1, nn.Conv2d)
    ]
    assert found
    for i, module in enumerate(found):
        kept = some(module.fc1.out_features, 1 - 0.1 * (i % 5), seed=i)
        keep(module.fc1, out=kept)
        keep(module.fc2, inp=kept)


def timm_squeeze(model):
    """The inner channels of every squeeze-and-excite."""
    found = [m for m in model.modules() if type(m).__name__ in ("SEModule", "SqueezeExcite")]
    assert found
    for i, module in enumerate(found):
        first, second = (
            (module.fc1, module.fc2)
            if hasattr(module, "fc1")
            else (module.conv_reduce, module.conv_expand)
        )
        kept = some(first.out_channels, 0.5, seed=i)
        keep(first, out=kept)
        keep(second, inp=kept)


def timm_densenet(model):
    """The bottleneck of every dense layer."""
    for name, module in model.named_modules():
        if type(module).__name__ == "DenseLayer":
            kept = some(module.conv1.out_channels, 0.5, seed=len(name))
            keep(module.conv1, out=kept)
            keep_norm(module.norm2, kept)
            keep(module.conv2, inp=kept)


TIMM = {
    "resnet10t": timm_resnet,
    "test_resnet": timm_resnet,
    "test_efficientnet": timm_squeeze,
    "mobilenetv3_small_050": timm_squeeze,
    "densenet121": timm_densenet,
    "test_convnext": timm_mlp,
    "test_vit": timm_mlp,
    "swin_tiny_patch4_window7_224": timm_mlp,
    "regnety_002": timm_squeeze,
}


_SMALLER = {
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 24,
        "depths": (1, 1, 2, 1),
        "img_size": 64,
        "window_size": 4,
    },
}


def pruned_timm(name, **kwargs):
    """A timm model in eval mode, cut by hand."""
    torch.manual_seed(0)
    kwargs = {**_SMALLER.get(name, {}), **kwargs}
    model = timm.create_model(name, num_classes=7, **kwargs).eval()
    TIMM[name](model)
    return model


class Plain(nn.Module):
    """A model of no library."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, values):
        return self.last(self.norm(self.first(values)))


def pruned_plain():
    """With half of its neurons."""
    model = Plain()
    graph = sosp_hub.trace(model, (torch.zeros(2, 6),))
    sizes = {name: group.size for name, group in graph.groups.items()}
    return sosp_hub.apply(
        model, graph, PruningPlan({name: tuple(range(0, n, 2)) for name, n in sizes.items()}, sizes)
    )
