"""A small model of any family of transformers, from its default config: sizes shrunk by name.

Nothing here knows a family: names of config values say what they are, and the signature of
``forward`` says what goes in. What cannot be built or run so is left out, with the reason.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WORDS, LENGTH, PIXELS = 128, 12, 32

_WIDTHS = {
    "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "encoder_hidden_size", "model_dim",
    "emb_dim", "word_embed_proj_dim", "embedding_size", "out_hidden_size", "vision_hidden_size",
    "text_hidden_size", "decoder_hidden_size", "embed_dim_per_head", "true_hidden_size",
    "hidden_dim", "output_dim", "width", "lru_width", "image_embed_dim", "encoder_embed_dim",
    "vision_embed_dim", "projection_hidden_size", "adapter_hidden_size", "qformer_hidden_size",
    "mask_feature_size", "feature_size", "fpn_feature_size", "fusion_hidden_size", "decoder_dim",
    "conv_dim_size", "speech_hidden_size", "audio_hidden_size", "projector_hidden_size",
}  # fmt: skip
_INNER = {
    "intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim",
    "d_inner", "dim_feedforward", "encoder_intermediate_size", "decoder_intermediate_size",
    "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size", "mlp_dim",
    "shared_intermediate_size", "feed_forward_size", "feedforward_dim", "inner_dim",
    "dense_intermediate_size", "encoder_feedforward_dim", "decoder_feedforward_dim", "ff_dim",
    "intermediate_size_mlp", "ffn_intermediate_size", "mlp_hidden_size",
}  # fmt: skip
_HEADS = {
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
    "decoder_attention_heads", "attention_heads", "num_decoder_attention_heads",
    "num_encoder_attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads",
    "num_cross_attention_heads", "num_self_attention_heads", "linear_num_value_heads",
    "linear_num_key_heads", "mamba_num_heads", "mamba_n_heads", "num_query_heads",
}  # fmt: skip
_KV_HEADS = {
    "num_key_value_heads", "n_head_kv", "num_kv_heads", "encoder_num_key_value_heads",
    "decoder_num_key_value_heads", "multi_query_group_num", "n_kv_heads",
}  # fmt: skip
_HEAD_DIMS = {
    "head_dim", "d_kv", "attention_head_dim", "d_head", "qk_nope_head_dim", "v_head_dim",
    "linear_key_head_dim", "linear_value_head_dim", "global_head_dim",
}  # fmt: skip
_LAYERS = {
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "depth", "num_decoder_layers", "num_encoder_layers", "encoder_num_layers", "num_blocks",
    "decoder_num_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers",
    "num_hidden_groups", "num_transformer_layers", "num_mel_layers", "resampler_depth",
    "encoder_depth", "decoder_depth", "max_depth", "num_local_layers", "vision_layers",
}  # fmt: skip
_OTHERS = {
    "vocab_size": WORDS, "text_vocab_size": WORDS, "max_position_embeddings": 64,
    "n_positions": 64, "n_ctx": 64, "max_seq_len": 64, "max_sequence_length": 64,
    "image_size": PIXELS, "img_size": PIXELS, "projection_dim": 24, "patch_size": 8,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_num_experts": 4, "moe_topk": 2, "moe_k": 2, "n_group": 2,
    "topk_group": 1, "num_expert_group": 2, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_rope_head_dim": 8, "rotary_dim": 8, "num_mel_bins": 16, "num_queries": 9,
    "num_feature_levels": 4, "conv_kernel_size": 3, "max_source_positions": 64,
    "max_target_positions": 64, "state_size": 8, "mamba_d_state": 8, "n_mels": 16,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "sliding_window": 8,
    "attention_window": 4, "codebook_size": 16, "max_text_length": 16, "spatial_merge_size": 2,
    "num_codebooks": 2, "window_size": 4, "pretrained_window_size": 4, "num_frames": 2,
    "first_k_dense_replace": 1, "backbone_channels": 32, "num_labels": 3, "index_topk": 4,
    "index_n_heads": 2, "index_head_dim": 16, "bottleneck_features": 32,
    "max_2d_position_embeddings": 64,
    "num_image_tokens": 16, "mm_tokens_per_image": 4, "image_seq_length": 16, "image_seq_len": 16,
    "scale_factor": 2, "pixel_shuffle_ratio": 0.5, "codebook_dim": 16, "chunk_size": 8,
    "max_length": 64, "num_groups": 4, "context_size": 16,
    "num_global_layers": 1, "num_nextn_predict_layers": 0, "upsample_groups": 4,
    "vocab_size_per_layer_input": WORDS, "hidden_size_per_layer_input": 16,
    "n_groups": 2, "mamba_n_groups": 2, "vector_quantization_hidden_dimension": 16,
    "unpadded_vocab_size": WORDS,
}  # fmt: skip
_LISTS = {
    "hidden_sizes", "encoder_hidden_sizes", "embed_dims", "neck_hidden_sizes", "conv_dim",
    "tdnn_dim", "out_channels", "fusion_hidden_sizes",
    "backbone_out_channels", "channels", "upsample_rates", "decoder_hidden_sizes",
}  # fmt: skip
_COUNTS = {"depths", "num_blocks_list", "layers_per_block", "num_conv_layers", "decoder_depths"}

_AUTO = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "CTC",
    "OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION", "DEPTH_ESTIMATION", "MASK_GENERATION", "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION", "MASKED_LM", "ZERO_SHOT_IMAGE_CLASSIFICATION", "KEYPOINT_DETECTION",
    "TIME_SERIES_PREDICTION", "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM", "MULTIMODAL_LM",
)  # fmt: skip


_BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 32, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
_WAVES_WITH_CHANNEL = (
    "Encodec", "Dac", "Mimi", "Xcodec", "PeAudio", "OmniASR", "NeuCodec", "HiggsAudio",
)  # fmt: skip


_IMAGE_TOKENS = ("image_token_id", "image_token_index", "media_token_id")
_AUDIO_TOKENS = ("audio_token_id", "audio_token_index")


def model_types() -> Iterator[tuple[str, str]]:
    """Model types, and the class of each that has the head that is used most."""
    seen: set[str] = set()
    there = set(dir(transformers))  # nothing is imported for it
    heads = [getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES") for kind in _AUTO]
    for model_type in CONFIG_MAPPING:
        for mapping in (*heads, modeling_auto.MODEL_MAPPING_NAMES):
            name = mapping.get(model_type)
            name = name[0] if isinstance(name, tuple | list) else name
            if name in there:
                if name not in seen:
                    seen.add(name)
                    yield model_type, name
                break


_POPULAR = (
    "exaone", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "mistral", "mistral3",
    "mixtral", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "phi", "phi3",
    "phi4_multimodal", "gpt-sw3", "gpt_neox", "gpt_oss", "gptj", "falcon", "bloom", "opt",
    "olmo2", "granite", "granitemoehybrid", "cohere2", "starcoder2", "stablelm", "smollm3", "glm4",
    "glm4_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "exaone4", "ernie4_5", "lfm2",
    "llama4", "minimax", "mamba", "mamba2", "falcon_h1", "jamba", "nemotron_h", "bert", "roberta",
    "distilbert", "albert", "electra", "deberta", "deberta-v2", "modernbert", "xlm-roberta",
    "mpnet", "nomic_bert", "longformer", "big_bird", "xlnet", "t5", "mt5", "t5gemma", "bart",
    "mbart", "m2m_100", "marian", "pegasus", "led", "layoutlmv3", "esm", "vit", "deit", "beit",
    "swin", "swinv2", "convnext", "convnextv2", "resnet", "dinov2", "dinov2_with_registers",
    "dinov3_vit", "dinov3_convnext", "segformer", "mask2former", "maskformer", "oneformer", "detr",
    "conditional_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "rf_detr", "d_fine", "yolos",
    "dpt", "depth_anything", "zoedepth", "sam", "sam2", "sam3", "videomae", "vivit", "vjepa2",
    "upernet", "mobilevit", "mobilenet_v2", "efficientnet", "clip", "siglip", "siglip2", "clipseg",
    "blip", "blip-2", "instructblip", "owlvit", "owlv2", "grounding-dino", "llava", "llava_next",
    "llava_onevision", "vipllava", "idefics2", "idefics3", "smolvlm", "internvl", "paligemma",
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "mllama", "pixtral", "florence2", "kosmos-2",
    "git", "vilt", "trocr", "donut-swin", "vision-encoder-decoder", "whisper", "wav2vec2",
    "wav2vec2-bert", "hubert", "wavlm", "speech_to_text", "speecht5", "seamless_m4t_v2",
    "audio-spectrogram-transformer", "clap", "encodec", "dac", "mimi", "musicgen", "bark", "vits",
    "moonshine", "parakeet_ctc", "voxtral", "qwen2_audio", "csm", "patchtst", "patchtsmixer",
    "timesfm", "informer", "time_series_transformer", "table-transformer", "tapas", "rwkv",
    "recurrent_gemma", "zamba2", "xlstm",
)  # fmt: skip  # GPT-2 and Llama go by the first model type of their class: gpt-sw3 and exaone
_PARTS = (
    "_text", "_vision", "_audio", "_encoder", "_decoder", "_model", "_tokenizer", "_vqmodel",
    "_assistant", "_thinker", "_with_hifigan",
)  # fmt: skip


def kind_of(model_type: str) -> str:
    """``popular``; ``part`` of another model, named after it; or ``other``."""
    if model_type in _POPULAR:
        return "popular"
    return "part" if model_type.endswith(_PARTS) else "other"


def head_of(name: str) -> str:
    """What the class of a model is for: what its name says after the model type."""
    return re.split(r"For(?=[A-Z])|(?=LMHead|Model$)", name)[-1]


_CAUTIOUS = {
    "vocab_size", "text_vocab_size", "max_position_embeddings", "n_positions", "image_size",
    "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "sliding_window",
    "num_nextn_predict_layers", "first_k_dense_replace",
}  # fmt: skip


def shrunk(config: Any, level: int = 0) -> dict[str, Any]:
    """The values of a config, with small sizes.

    Args:
        config: A config.
        level: What is left as it is, since others may depend on it: 1 = sizes other than widths,
            heads, layers and words, 2 = widths and heads as well.
    """
    values: dict[str, Any] = {}
    given = set(inspect.signature(type(config).__init__).parameters) | {
        name for kind in type(config).__mro__ for name in vars(kind).get("__annotations__", {})
    }
    for name, value in vars(config).items():
        if hasattr(value, "to_diff_dict"):
            small = shrunk(value, level)
            other = {k: v for k, v in value.to_diff_dict().items() if k not in _HEAD_DIMS}
            other.pop("per_layer_config", None)  # by the numbers of layers that are gone
            layers = small.get("num_hidden_layers")
            if "out_indices" in small or (layers and _is_beyond(layers, other)):
                other.pop("out_features", None)  # of fewer layers
                other.pop("out_indices", None)
            values[name] = {**other, **small, "model_type": value.model_type}
        elif name in given and not name.startswith("_"):
            new = _small(name, value, level)
            if new is not value:
                values[name] = new
    layers = next((values[n] for n in ("num_hidden_layers", "n_layer") if n in values), None)
    for name, value in vars(config).items():  # one entry for each layer
        count = getattr(config, "num_hidden_layers", None)
        if name not in values and isinstance(value, list) and layers and len(value) == count:
            values[name] = _varied(value, layers)
    if "qk_rope_head_dim" in values and "head_dim" in values:
        values["head_dim"] = values["qk_rope_head_dim"]  # of the part that is turned
    if "kv_lora_rank" in values and "num_key_value_heads" in values:  # of latent ones each head has
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name in ("backbone_out_indices", "out_indices"):
        number = len(getattr(config, name, None) or ())
        if number > values.get("num_hidden_layers", number):  # a feature map for each of the necks
            values |= {"num_hidden_layers": number, name: [*range(number)]}
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        values["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1}
    backbone = getattr(config, "backbone_config", False)
    if backbone is None or getattr(backbone, "model_type", "") == "timm_backbone":
        stages = [*_BACKBONE["out_features"]]
        if hasattr(config, "mask_feature_size") or hasattr(config, "pool_scales"):
            stages = ["stage1", *stages]
        values |= {
            "backbone_config": {**_BACKBONE, "out_features": stages},
            "backbone": None,
            "use_timm_backbone": False,
        }
    for name, size in (("vocab_size", 33), ("num_experts_per_tok", 2), ("prediction_length", 4)):
        if vars(config).get(name, size) is None:
            values[name] = size
    if getattr(config, "pad_token_id", None) is not None and config.pad_token_id >= WORDS:
        values["pad_token_id"] = 0
    for name in vars(config):
        token = vars(config)[name]
        if name.endswith(("token_id", "token_index")) and type(token) is int and token >= WORDS:
            values[name] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}.get(
                name, WORDS - 2 - sum(map(ord, name)) % 20
            )
        elif name in _IMAGE_TOKENS + _AUDIO_TOKENS and token is None:  # left to the processor
            values[name] = WORDS - 1
    return values


def _is_beyond(layers: int, values: dict[str, Any]) -> bool:
    """Whether a feature is that of a layer after the first few."""
    named = [name.removeprefix("stage") for name in values.get("out_features") or ()]
    return any(name.isdecimal() and int(name) > layers for name in named)


def _varied(value: list[Any], number: int) -> list[Any]:
    """The first entries, and the last one where no other kind is among them."""
    first = value[: number - 1]
    rest = [each for each in value if each not in first]
    return [*first, rest[0] if rest else value[number - 1]]


def _small(name: str, value: Any, level: int) -> Any:
    if level and name in _OTHERS and name not in _CAUTIOUS:
        return value
    if level > 1 and name not in _LAYERS | _CAUTIOUS:
        return value
    if type(value) is int and value > 1:
        for names, size in (
            (_WIDTHS, 64), (_INNER, 96), (_HEADS, 4), (_HEAD_DIMS, 16), (_LAYERS, 2),
        ):  # fmt: skip
            if name in names:
                return min(size, value)
        if name in _KV_HEADS:
            return 2
        return min(_OTHERS.get(name, value), value)
    if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        if name in _LISTS:
            low = min(value)
            return type(value)([max(8, min(64, 16 * item // low)) for item in value])
        if name in _COUNTS:
            return type(value)([min(1, item) for item in value])
        if name in {"image_size", "img_size"}:
            return type(value)([PIXELS for _ in value])
        if name in _HEADS:
            return type(value)([4 if item > 3 else min(2, item) for item in value])
    return value


_EFFICIENT = {
    "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320,
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
}  # fmt: skip
_GEMMA3N = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 96,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 8,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0], "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": WORDS,
}  # fmt: skip
_GEMMA4_VISION = {
    "model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "patch_size": 8,
    "position_embedding_size": 64,
}  # fmt: skip
_HGNET = {
    "hidden_sizes": [16, 32, 32, 64], "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 32, 32], "stage_mid_channels": [8, 8, 16, 16],
    "stage_out_channels": [16, 32, 32, 64], "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
}  # fmt: skip
_DINOV2 = {
    "model_type": "dinov2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
_SAM = {
    "vision_config": {"output_channels": 64, "num_pos_feats": 32, "global_attn_indexes": [1]},
    "prompt_encoder_config": {"image_embedding_size": 4},
}
_CONFORMER = {"encoder_config": {"num_key_value_heads": 4}}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_GRID = {"image_grid_pinpoints": [[32, 64], [64, 32]]}
_VALUES: dict[str, dict[str, Any]] = {
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {
        "text_config": _GEMMA3N, "vision_soft_tokens_per_image": 1,
        "vision_config": {"architecture": "test_resnet", "hidden_size": 96},
    },
    "gemma4": {"vision_config": _GEMMA4_VISION},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        "vision_config": _GEMMA4_VISION,
    },
    "efficientnet": _EFFICIENT,
    "align": {
        "vision_config": _EFFICIENT, "projection_dim": 80, "text_config": {"hidden_size": 80},
    },
    "clap": {
        "audio_config": {
            "spec_size": 128, "num_mel_bins": 32, "patch_embeds_hidden_size": 16,
            "hidden_size": 128,
        },
    },
    "paligemma": {"projection_dim": 64, "vision_config": {"projection_dim": 64}},
    "sam": _SAM,
    "sam_hq": {**_SAM, "mask_decoder_config": {"vit_dim": 64}},
    "timesfm2_5": {"context_length": 128},
    "zoedepth": {"bottleneck_features": 64},
    "parakeet_ctc": _CONFORMER,
    "parakeet_rnnt": _CONFORMER,
    "canary": _CONFORMER,
    "cohere_asr": _CONFORMER,
    "hgnet_v2": {"image_size": 96},  # in training, too, more than two values to be normalised
    "qwen3_vl": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "maskformer": {"image_size": 64},  # more than one place of one channel, to be normalised
    "kosmos-2": {"latent_query_num": 4},
    "csm": {"depth_decoder_config": {"backbone_hidden_size": 64}},
    "esm": {"pad_token_id": 1},
    "aria": {"projector_patch_to_query_dict": {"16": 8}},
    "mobilevitv2": {"image_size": 64},
    "mamba2": {"num_heads": 8},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8, "input_size": PIXELS},
    "oneformer": {"task_seq_len": LENGTH, "conv_dim": 64, "mask_dim": 64},
    "wav2vec2-bert": {"feature_projection_input_dim": 16},
    "d_fine": {
        "image_size": 96,  # as above: 32 pixels become one place, and statistics of two values
        "backbone_config": _HGNET, "encoder_in_channels": [32, 32, 64], "encoder_hidden_dim": 64,
        "decoder_in_channels": [64, 64, 64], "d_model": 64,
    },
    "deimv2": {
        "image_size": 96,
        "backbone_config": _HGNET, "encoder_in_channels": [32, 32, 64], "encoder_hidden_dim": 64,
        "decoder_in_channels": [64, 64, 64], "d_model": 64,
    },
    "depth_pro": {
        "image_size": 64, "patch_size": 16, "intermediate_hook_ids": [1, 0],
        "scaled_images_feature_dims": [32, 32, 16], "intermediate_feature_dims": [16, 16],
        "fusion_hidden_size": 16, "merge_padding_value": 1,
        "image_model_config": _DINOV2, "patch_model_config": _DINOV2, "fov_model_config": _DINOV2,
    },
    "layoutlmv2": {"coordinate_size": 12, "shape_size": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32},
    "xmod": {"default_language": "en_XX"},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "pp_ocrv5_mobile_rec": {"image_size": [96, 96]},  # rows are halved four times and pooled
    "pp_ocrv5_server_rec": {"image_size": [48, 96]},
    "pp_ocrv6_small_rec": {"image_size": [48, 96]},
    "pp_ocrv6_tiny_rec": {"image_size": [48, 96]},
    "swin": {"image_size": 128},
    "donut-swin": {"image_size": 128},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "grounding-dino": {"num_queries": 4},
    "mm-grounding-dino": {"num_queries": 4},
    "llava_next": _GRID,
    "llava_next_video": _GRID,
    "llava_onevision": _GRID,
    "granite4_vision": _GRID,
    "florence2": {"vision_config": {"projection_dim": 64}},
    "glm4v": {"text_config": _ROPE},
    "glm_ocr": {"text_config": _ROPE},
    "qwen2_vl": {"text_config": _ROPE},
    "qwen2_5_vl": {"text_config": _ROPE, "vision_config": {"window_size": 32}},
    "voxtral": {"audio_config": {"intermediate_size": 256}},
    "sam2": {
        "vision_config": {
            "backbone_config": {
                "hidden_size": 16, "embed_dim_per_stage": [16, 32, 64, 128],
                "num_attention_heads_per_stage": [1, 2, 4, 8], "blocks_per_stage": [1, 1, 2, 1],
            },
            "backbone_channel_list": [128, 64, 32, 16], "fpn_hidden_size": 64,
            "backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]],
        },
        "prompt_encoder_config": {"patch_size": 16},
    },
}  # fmt: skip
"""What names alone do not tell."""


def _merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(values[k], v) if isinstance(v, dict) and k in values else v
            for k, v in more.items()}  # fmt: skip
    return {**values, **both}


_MOST_PARAMETERS = 40_000_000


def built(name: str) -> tuple[nn.Module, dict[str, Any], Any]:
    """A small model of a class, inputs that it runs on, and what it returns."""
    first: Exception | None = None
    for level in range(3):
        try:
            model = build(name, level)
            return (model, *run(model))
        except Exception as error:  # noqa: BLE001 - names of values do not tell all that they mean
            first = first or error
    assert first is not None
    raise first


def build(name: str, level: int = 0) -> nn.Module:
    """A small model of a class; ``level`` is that of `shrunk`."""
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    values = shrunk(config_class(), level)
    if "is_decoder" in inspect.signature(config_class.__init__).parameters:
        values |= {"is_decoder": True} if "LMHead" in name or "CausalLM" in name else {}
    if "SemanticSegmentation" in name and hasattr(config_class(), "out_indices"):
        values |= {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
    values = _merged(values, _VALUES.get(config_class.model_type, {}))
    if level:
        with torch.device("meta"):
            large = model_class(config_class(**values))
        if sum(parameter.numel() for parameter in large.parameters()) > _MOST_PARAMETERS:
            raise ValueError("too large with the widths of its default config")
    return model_class(config_class(**values)).eval()


def run(model: nn.Module) -> tuple[dict[str, Any], Any]:
    """The first inputs that it runs on, and what it returns."""
    first: Exception | None = None
    for inputs in _variants(model):
        try:
            for place in (
                ("pixel_values", "get_image_features", _IMAGE_TOKENS),
                ("input_features", "get_audio_features", _AUDIO_TOKENS),
            ):
                _place_features(model, model.config, inputs, *place)
            with torch.no_grad():
                return inputs, model(**inputs)
        except Exception as error:  # noqa: BLE001 - names of arguments do not tell all layouts
            first = first or error
    assert first is not None
    raise first


def _variants(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs, and layouts that models of one modality do not agree about."""
    found = inputs_of(model)
    yield found
    asked = inspect.signature(model.forward).parameters
    config: Any = model.config
    if (sound := found.get("input_features")) is not None:
        yield {**found, "input_features": sound.transpose(1, 2)[:, None]}
        for features in (sound, sound.transpose(1, 2)):
            yield {**found, "input_features": features}
            for name in ("input_features_mask", "attention_mask"):
                if name in asked:
                    for length in features.shape[1:]:
                        mask = torch.ones(2, length, dtype=torch.long)
                        yield {**found, "input_features": features, name: mask}
    if (wave := found.get("input_values")) is not None:
        if "input_ids" in found:
            yield {name: value for name, value in found.items() if name != "input_values"}
        bins = getattr(config, "num_mel_bins", 16)
        longer = torch.randn(2, getattr(config, "max_length", 64), bins)
        for values in (longer, wave.repeat(1, *(1,) * (wave.dim() - 2), 10)):
            yield {**found, "input_values": values}
    if "future_values" in found:
        yield {name: value for name, value in found.items() if name != "future_values"}
    if (picture := found.get("pixel_values")) is not None:
        yield {**found, "pixel_values": picture[:, None]}
        for number in (2, 3):
            yield {**found, "pixel_values": picture[:, None].repeat(1, number, 1, 1, 1)}


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """What its ``forward`` asks for, for a batch of two."""
    config: Any = model.config
    asked = inspect.signature(model.forward).parameters
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vision = getattr(config, "vision_config", config)
    audio = getattr(config, "audio_config", config)
    found: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)

    def words(length: int = LENGTH) -> torch.Tensor:
        high = min(getattr(text, "vocab_size", WORDS) or WORDS, 90)
        return torch.randint(min(5, high // 2), high, (2, length), generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    size = next(
        (
            v
            for v in (getattr(vision, "image_size", None), getattr(config, "image_size", None))
            if v
        ),
        PIXELS,
    )
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    of_bins = ("num_mel_bins", "n_mels", "input_feat_per_channel")
    bins = next((getattr(audio, n) for n in of_bins if getattr(audio, n, None)), 16)
    each = [config.num_input_channels] if hasattr(config, "num_input_channels") else []
    past = (getattr(config, "context_length", None) or 32) + max(
        getattr(config, "lags_sequence", None) or [0]
    )
    maker = inspect.signature(getattr(model, "get_image_features", words)).parameters
    if "image_sizes" not in maker or maker["image_sizes"].default is not inspect.Parameter.empty:
        asked = {name: value for name, value in asked.items() if name != "image_sizes"}
    makers = {
        "input_ids": words,
        "pixel_values": lambda: noise(2, channels, height, width),
        "input_values": lambda: noise(
            2, *((1,) if type(model).__name__.startswith(_WAVES_WITH_CHANNEL) else ()), 1600
        ),
        "image_grid_thw": lambda: torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "grid_thw": lambda: torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "image_sizes": lambda: torch.tensor([[height, width], [height, width]]),
        "task_inputs": words,
        "qformer_input_ids": words,
        "feature_attention_mask": lambda: torch.ones(
            2, 2 * getattr(audio, "max_source_positions", 20), dtype=torch.long
        ),
        "query_embeds": lambda: noise(2, 9, getattr(config, "hidden_size", 64)),
        "input_features": lambda: noise(2, bins, 2 * getattr(audio, "max_source_positions", 20)),
        "decoder_input_ids": lambda: words(7),
        "bbox": lambda: torch.tensor([1, 2, 10, 20]).repeat(2, LENGTH, 1),
        "image_attention_mask": lambda: torch.ones(2, LENGTH, 1, dtype=torch.long),
        "image_embeds_position_mask": lambda: torch.arange(LENGTH).lt(4).long().repeat(2, 1),
        "past_values": lambda: noise(2, past, *each),
        "past_observed_mask": lambda: torch.ones(2, past, *each),
        "past_time_features": lambda: noise(2, past, getattr(config, "num_time_features", 1)),
        "future_time_features": lambda: noise(
            2, config.prediction_length, getattr(config, "num_time_features", 1)
        ),
        "future_values": lambda: noise(2, getattr(config, "prediction_length", 8)),
        "pixel_values_videos": lambda: noise(
            2, getattr(config, "num_frames", 2), channels, height, width
        ),
    }
    for name, maker in makers.items():
        if name in asked and not (name == "pixel_values_videos" and "pixel_values" in asked):
            found[name] = maker()
    if "image_grid_thw" in found and "pixel_values" in found:
        patch = getattr(vision, "patch_size", 8) * getattr(vision, "patch_size", 8)
        found["pixel_values"] = noise(
            32, channels * patch * (getattr(vision, "temporal_patch_size", 1) or 1)
        )
    if "grid_thw" in found:  # a vision tower alone: patches of both pictures one after the other
        patch = vision.patch_size**2 * (getattr(vision, "temporal_patch_size", 1) or 1)
        name = "hidden_states" if "hidden_states" in asked else "pixel_values"
        found[name] = noise(32, channels * patch)
    if "feature_attention_mask" in found and not hasattr(model, "get_audio_features"):
        found["input_ids"][:, 0] = config.audio_token_id  # one stands for all of a sound
    if "spatial_shapes" in asked and "pixel_values" in found:  # patches as well
        found["pixel_values"] = noise(2, 16, channels * vision.patch_size**2)
        found["spatial_shapes"] = torch.tensor([[4, 4], [4, 4]])
        found["pixel_attention_mask"] = torch.ones(2, 16, dtype=torch.long)
    if "image_position_ids" in asked and "pixel_values" in found:  # patches, three of them in one
        side = 2 * getattr(vision, "pooling_kernel_size", 3)
        found["pixel_values"] = noise(2, side * side, channels * vision.patch_size**2)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1)
        found["image_position_ids"] = places.repeat(2, 1, 1)
    if "attention_mask" in asked and "input_ids" in found and "pixel_values" not in found:
        found["attention_mask"] = torch.ones_like(found["input_ids"])
    if "use_cache" in asked or getattr(text, "use_cache", False):
        found["use_cache"] = False
    return found


def _place_features(
    model: nn.Module, config: Any, found: dict[str, Any], data: str, maker: str, names: Any
) -> None:
    """As many places for an image, or a sound, in the prompt as its features are long."""
    token = next((getattr(config, n) for n in names if getattr(config, n, None) is not None), None)
    if token is None or not {data, "input_ids"} <= found.keys() or not hasattr(model, maker):
        return
    with torch.no_grad():
        makes: Any = getattr(model, maker)
        wants = inspect.signature(makes).parameters
        names = [n for n in wants if n in found] or [data]  # those that hand on what they get
        features: Any = makes(**{name: found[name] for name in names})
    features = getattr(features, "pooler_output", features)
    if isinstance(features, tuple | list):
        features = torch.stack(list(features)) if len(features) > 1 else features[0]
    if not isinstance(features, torch.Tensor):
        features = features.last_hidden_state
    rows = features.reshape(-1, features.shape[-1]).shape[0]
    ids = found["input_ids"]
    found["input_ids"] = torch.cat([torch.full((2, rows // 2), token), ids], 1)
    if "attention_mask" in inspect.signature(model.forward).parameters:
        found["attention_mask"] = torch.ones_like(found["input_ids"])
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inspect.signature(model.forward).parameters:
            found[name] = (found["input_ids"] == token).int()


_TASK_OUTPUTS = (
    ("logits", "pred_boxes"), ("logits_per_image",), ("logits",), ("prediction_outputs",),
    ("class_queries_logits", "masks_queries_logits"), ("predicted_depth",), ("pred_masks",),
    ("audio_values",), ("waveform",), ("spectrogram",), ("start_logits", "end_logits"),
    ("prediction_logits",), ("image_embeds", "text_embeds"), ("full_predictions",),
    ("last_hidden_state",),
)  # fmt: skip


def task_outputs(result: Any) -> tuple[str, ...] | None:
    """The outputs that a task reads, of what a model returned; None = all."""
    has = set(result) if hasattr(result, "keys") else set()
    return next((names for names in _TASK_OUTPUTS if has.issuperset(names)), None)
