"""Tiny random models of transformers families, as data: what the coverage benchmark runs over."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

WORDS, LENGTH, PIXELS = 99, 12, 32


@dataclass(frozen=True)
class Family:
    """One family of transformers.

    Attributes:
        name: The family, and the layout where one has several.
        model: Name of the model class.
        config: What its config class is given; values that are dicts belong to sub-configs.
        inputs: Makes example inputs for a batch of two.
        outputs: The outputs that matter; None = all.
    """

    name: str
    model: str
    config: dict[str, Any] = field(repr=False)
    inputs: Callable[[], dict[str, Tensor]] = field(repr=False)
    outputs: str | tuple[str, ...] | None = "logits"

    def build(self) -> nn.Module:
        """The model, in eval mode."""
        model_class = getattr(transformers, self.model)
        return model_class(model_class.config_class(**self.config)).eval()


def _words() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 90, (2, LENGTH)), "use_cache": False}


def _masked_words() -> dict[str, Tensor]:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    return {"input_ids": torch.randint(5, 90, (2, LENGTH)), "attention_mask": mask}


def _pair() -> dict[str, Tensor]:
    return {**_words(), "decoder_input_ids": torch.randint(5, 90, (2, 7))}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, PIXELS, PIXELS)}


def _wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 1600)}


def _spectrum() -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (2, 7))
    return {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": ids, "use_cache": False}


def _both() -> dict[str, Tensor]:
    return {**_masked_words(), **_pixels()}


def _image_and_words() -> dict[str, Tensor]:
    """A prompt with one image of 16 patches (token 98)."""
    ids = torch.cat([torch.full((2, 16), 98), torch.randint(5, 90, (2, LENGTH))], 1)
    return {"input_ids": ids, **_pixels(), "use_cache": False}


_TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_TEXT, "num_key_value_heads": 2}
_GQA_DIM = {**_GQA, "head_dim": 16}
_MOE = {**_GQA, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_IMAGE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": PIXELS,
    "patch_size": 8,
}
_SPEECH = {
    **{key: _TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    "vocab_size": 32,
    "intermediate_size": 96,
    "conv_dim": (32, 32),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
}
_BART = {
    "vocab_size": WORDS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_T5 = {
    "vocab_size": WORDS,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_CLIP_TEXT = {**_TEXT, "projection_dim": 24}
_CLIP_IMAGE = {**_IMAGE, "projection_dim": 24}


def _decoder(name: str, model: str, config: dict[str, Any], **more: Any) -> Family:
    return Family(name, model, {**config, **more}, _words)


def _encoder(name: str, model: str, config: dict[str, Any], **more: Any) -> Family:
    return Family(name, model, {**config, **more}, _masked_words)


def _image(name: str, model: str, config: dict[str, Any], **more: Any) -> Family:
    return Family(name, model, {**config, **more}, _pixels)


DECODERS = (
    _decoder("llama_gqa", "LlamaForCausalLM", _GQA),
    _decoder("llama_mha", "LlamaForCausalLM", _TEXT),
    _decoder("llama_mqa", "LlamaForCausalLM", _TEXT, num_key_value_heads=1),
    _decoder("mistral", "MistralForCausalLM", _GQA),
    _decoder("ministral", "MinistralForCausalLM", _GQA_DIM),
    _decoder("qwen2", "Qwen2ForCausalLM", _GQA),
    _decoder("qwen3", "Qwen3ForCausalLM", _GQA_DIM),
    _decoder("gemma", "GemmaForCausalLM", _GQA_DIM, num_key_value_heads=1),
    _decoder("gemma2", "Gemma2ForCausalLM", _GQA_DIM),
    _decoder("gemma3", "Gemma3ForCausalLM", _GQA_DIM),
    _decoder("phi", "PhiForCausalLM", _TEXT),
    _decoder("phi3", "Phi3ForCausalLM", _GQA),
    _decoder("olmo", "OlmoForCausalLM", _GQA),
    _decoder("olmo2", "Olmo2ForCausalLM", _GQA),
    _decoder("starcoder2", "Starcoder2ForCausalLM", _GQA),
    _decoder("stablelm", "StableLmForCausalLM", _GQA),
    _decoder("granite", "GraniteForCausalLM", _GQA),
    _decoder("cohere", "CohereForCausalLM", _GQA),
    _decoder("cohere2", "Cohere2ForCausalLM", _GQA),
    _decoder("glm", "GlmForCausalLM", _GQA_DIM),
    _decoder("glm4", "Glm4ForCausalLM", _GQA_DIM),
    _decoder("smollm3", "SmolLM3ForCausalLM", _GQA),
    _decoder("nemotron", "NemotronForCausalLM", _GQA),
    _decoder("helium", "HeliumForCausalLM", _GQA_DIM),
    _decoder("arcee", "ArceeForCausalLM", _GQA),
    _decoder("seed_oss", "SeedOssForCausalLM", _GQA_DIM),
    _decoder("exaone4", "Exaone4ForCausalLM", _GQA),
    _decoder(
        "gpt2", "GPT2LMHeadModel", {"vocab_size": WORDS, "n_embd": 64, "n_layer": 2, "n_head": 4},
        n_positions=64, bos_token_id=1, eos_token_id=2,
    ),
    _decoder(
        "gpt_bigcode_mqa", "GPTBigCodeForCausalLM", {"vocab_size": WORDS, "n_embd": 64},
        n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
    ),
    _decoder(
        "gpt_neo", "GPTNeoForCausalLM", {"vocab_size": WORDS, "hidden_size": 64, "num_layers": 2},
        num_heads=4, attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
        window_size=8, bos_token_id=1, eos_token_id=2,
    ),
    _decoder("gpt_neox", "GPTNeoXForCausalLM", _TEXT),
    _decoder(
        "gptj", "GPTJForCausalLM", {"vocab_size": WORDS, "n_embd": 64, "n_layer": 2, "n_head": 4},
        rotary_dim=8, n_positions=64, bos_token_id=1, eos_token_id=2,
    ),
    _decoder(
        "codegen", "CodeGenForCausalLM", {"vocab_size": WORDS, "n_embd": 64, "n_layer": 2},
        n_head=4, rotary_dim=8, n_positions=64, n_ctx=64, bos_token_id=1, eos_token_id=2,
    ),
    _decoder(
        "opt", "OPTForCausalLM", {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2},
        ffn_dim=96, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64,
    ),
    _decoder(
        "bloom", "BloomForCausalLM", {"vocab_size": WORDS, "hidden_size": 64}, n_layer=2, n_head=4,
    ),
    _decoder(
        "falcon_mqa", "FalconForCausalLM", {"vocab_size": WORDS, "hidden_size": 64},
        num_hidden_layers=2, num_attention_heads=4,
    ),
    _decoder(
        "falcon_gqa", "FalconForCausalLM", {"vocab_size": WORDS, "hidden_size": 64},
        num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True,
    ),
    _decoder(
        "mpt", "MptForCausalLM", {"vocab_size": WORDS, "d_model": 64, "n_layers": 2, "n_heads": 4},
        max_seq_len=64,
    ),
    _decoder("persimmon", "PersimmonForCausalLM", _TEXT),
    _decoder("biogpt", "BioGptForCausalLM", _TEXT),
    _decoder(
        "xglm", "XGLMForCausalLM", {"vocab_size": WORDS, "d_model": 64, "num_layers": 2},
        attention_heads=4, ffn_dim=96, max_position_embeddings=64,
    ),
)  # fmt: skip

MIXTURES = (
    _decoder("mixtral", "MixtralForCausalLM", _MOE),
    _decoder("qwen2_moe", "Qwen2MoeForCausalLM", _MOE, moe_intermediate_size=48,
             shared_expert_intermediate_size=48),
    _decoder("qwen3_moe", "Qwen3MoeForCausalLM", _MOE, moe_intermediate_size=48, head_dim=16),
    _decoder("olmoe", "OlmoeForCausalLM", _MOE),
    _decoder("granitemoe", "GraniteMoeForCausalLM", _MOE),
    _decoder("phimoe", "PhimoeForCausalLM", _MOE),
    _decoder("gpt_oss", "GptOssForCausalLM", _MOE, head_dim=16),
    _decoder(
        "deepseek_v3", "DeepseekV3ForCausalLM", _TEXT, n_routed_experts=4, n_group=2,
        num_key_value_heads=4, moe_intermediate_size=48, q_lora_rank=24, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=1,
        num_experts_per_tok=2, topk_group=2,
    ),
)  # fmt: skip

RECURRENT = (
    _decoder("mamba", "MambaForCausalLM", {"vocab_size": WORDS, "hidden_size": 64},
             num_hidden_layers=2, state_size=8),
    _decoder("mamba2", "Mamba2ForCausalLM", {"vocab_size": WORDS, "hidden_size": 64},
             num_hidden_layers=2, state_size=8, num_heads=8, head_dim=16, n_groups=2, chunk_size=8),
    _decoder("falcon_mamba", "FalconMambaForCausalLM", {"vocab_size": WORDS, "hidden_size": 64},
             num_hidden_layers=2, state_size=8),
    _decoder("recurrent_gemma", "RecurrentGemmaForCausalLM", _GQA_DIM, num_hidden_layers=3,
             lru_width=64, attention_window_size=16),
)  # fmt: skip

ENCODERS = (
    _encoder("bert", "BertForSequenceClassification", _TEXT),
    _encoder("roberta", "RobertaForSequenceClassification", _TEXT),
    _encoder("xlm_roberta", "XLMRobertaForTokenClassification", _TEXT),
    _encoder("camembert", "CamembertForMaskedLM", _TEXT),
    _encoder("electra", "ElectraForSequenceClassification", _TEXT, embedding_size=32),
    _encoder("albert", "AlbertForSequenceClassification", _TEXT, embedding_size=32),
    _encoder("mpnet", "MPNetForSequenceClassification", _TEXT),
    _encoder("deberta", "DebertaForSequenceClassification", _TEXT),
    _encoder("deberta_v2", "DebertaV2ForSequenceClassification", _TEXT),
    _encoder("modernbert", "ModernBertForSequenceClassification", _TEXT),
    _encoder("megatron_bert", "MegatronBertForSequenceClassification", _TEXT),
    _encoder("roformer", "RoFormerForSequenceClassification", _TEXT, embedding_size=64),
    _encoder("convbert", "ConvBertForSequenceClassification", _TEXT, embedding_size=64),
    _encoder("esm", "EsmForSequenceClassification", _TEXT, mask_token_id=4),
    _encoder("squeezebert", "SqueezeBertForSequenceClassification", _TEXT, embedding_size=64),
    _encoder("mobilebert", "MobileBertForSequenceClassification", _TEXT, embedding_size=32,
             intra_bottleneck_size=32, true_hidden_size=32),
    _encoder("fnet", "FNetForSequenceClassification", _TEXT),
    _encoder(
        "distilbert", "DistilBertForSequenceClassification", {"vocab_size": WORDS, "dim": 64},
        n_layers=2, n_heads=4, hidden_dim=96, max_position_embeddings=64,
    ),
    _encoder(
        "xlnet", "XLNetForSequenceClassification", {"vocab_size": WORDS, "d_model": 64},
        n_layer=2, n_head=4, d_inner=96,
    ),
)  # fmt: skip

PAIRS = (
    Family("t5", "T5ForConditionalGeneration", _T5, _pair),
    Family(
        "t5_gated", "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}, _pair
    ),
    Family("mt5", "MT5ForConditionalGeneration", _T5, _pair),
    Family("t5_encoder", "T5EncoderModel", _T5, _masked_words, "last_hidden_state"),
    Family("umt5", "UMT5ForConditionalGeneration", _T5, _pair),
    Family("bart", "BartForConditionalGeneration", _BART, _pair),
    Family("mbart", "MBartForConditionalGeneration", _BART, _pair),
    Family("pegasus", "PegasusForConditionalGeneration", _BART, _pair),
    Family("marian", "MarianMTModel", _BART, _pair),
    Family("m2m_100", "M2M100ForConditionalGeneration", _BART, _pair),
    Family("blenderbot", "BlenderbotForConditionalGeneration", _BART, _pair),
)

VISION = (
    _image("vit", "ViTForImageClassification", _IMAGE),
    _image("deit", "DeiTForImageClassification", _IMAGE),
    _image("beit", "BeitForImageClassification", _IMAGE),
    _image("dinov2", "Dinov2ForImageClassification", _IMAGE, mlp_ratio=2),
    _image(
        "dinov2_registers", "Dinov2WithRegistersForImageClassification", _IMAGE,
        mlp_ratio=2, num_register_tokens=2,
    ),
    _image("ijepa", "IJepaForImageClassification", _IMAGE),
    _image(
        "swin", "SwinForImageClassification", {"image_size": PIXELS, "patch_size": 4},
        embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4,
    ),
    _image(
        "swinv2", "Swinv2ForImageClassification", {"image_size": PIXELS, "patch_size": 4},
        embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4,
    ),
    _image(
        "resnet", "ResNetForImageClassification", {"embedding_size": 16, "hidden_sizes": [16, 32]},
        depths=[1, 1], layer_type="basic",
    ),
    _image(
        "resnet_bottleneck", "ResNetForImageClassification", {"embedding_size": 16},
        hidden_sizes=[32, 64], depths=[1, 1], layer_type="bottleneck",
    ),
    _image(
        "regnet", "RegNetForImageClassification", {"embedding_size": 16, "hidden_sizes": [16, 32]},
        depths=[1, 1], groups_width=8,
    ),
    _image(
        "convnext", "ConvNextForImageClassification", {"hidden_sizes": [16, 32, 32, 32]},
        depths=[1, 1, 1, 1], image_size=PIXELS, patch_size=4,
    ),
    _image(
        "convnextv2", "ConvNextV2ForImageClassification", {"hidden_sizes": [16, 32, 32, 32]},
        depths=[1, 1, 1, 1], image_size=PIXELS, patch_size=4,
    ),
    _image("mobilenet_v1", "MobileNetV1ForImageClassification", {"depth_multiplier": 0.25}),
    _image("mobilenet_v2", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.25}),
    _image(
        "mobilevit", "MobileViTForImageClassification", {"hidden_sizes": [24, 32, 40]},
        neck_hidden_sizes=[8, 16, 16, 24, 24, 32, 64], image_size=64, num_attention_heads=4,
    ),
    _image(
        "poolformer", "PoolFormerForImageClassification", {"hidden_sizes": [16, 32, 32, 32]},
        depths=[1, 1, 1, 1],
    ),
    _image(
        "pvt", "PvtForImageClassification", {"hidden_sizes": [16, 32, 32, 32]},
        image_size=PIXELS, depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 2],
        sequence_reduction_ratios=[4, 2, 1, 1],
    ),
    _image(
        "segformer", "SegformerForImageClassification", {"hidden_sizes": [16, 32, 32, 32]},
        depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 2],
    ),
    _image(
        "levit", "LevitForImageClassification", {"image_size": 32, "hidden_sizes": [32, 48, 64]},
        num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8],
    ),
    _image(
        "focalnet", "FocalNetForImageClassification", {"image_size": PIXELS, "patch_size": 4},
        embed_dim=16, depths=[1, 1], hidden_sizes=[16, 32], focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    _image(
        "efficientnet", "EfficientNetForImageClassification", {"width_coefficient": 0.25},
        depth_coefficient=0.3, image_size=64, hidden_dim=320,
    ),
    _image(
        "cvt", "CvtForImageClassification", {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3]},
        depth=[1, 2, 3],
    ),
    Family(
        "vit_mae", "ViTMAEModel", {**_IMAGE, "mask_ratio": 0.0},
        lambda: {**_pixels(), "noise": torch.rand(2, 16)}, "last_hidden_state",
    ),
)  # fmt: skip
OTHERS = (
    Family("clip", "CLIPModel", {"text_config": _CLIP_TEXT, "vision_config": _CLIP_IMAGE,
                                 "projection_dim": 24}, _both, "logits_per_image"),
    Family("clip_vision", "CLIPVisionModel", _IMAGE, _pixels, "pooler_output"),
    Family("siglip", "SiglipModel", {"text_config": _TEXT, "vision_config": _IMAGE}, _both,
           "logits_per_image"),
    Family("siglip_vision", "SiglipVisionModel", _IMAGE, _pixels, "pooler_output"),
    Family("wav2vec2", "Wav2Vec2ForCTC", _SPEECH, _wave),
    Family("hubert", "HubertForCTC", _SPEECH, _wave),
    Family("wavlm", "WavLMForCTC", _SPEECH, _wave),
    Family("sew", "SEWForCTC", {**_SPEECH, "squeeze_factor": 2}, _wave),
    Family("ast", "ASTForAudioClassification",
           {**_IMAGE, "max_length": 64, "num_mel_bins": 32, "patch_size": 16},
           lambda: {"input_values": torch.randn(2, 64, 32)}),
    Family("whisper", "WhisperForConditionalGeneration",
           {**_BART, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 20},
           _spectrum),
    Family("speech_to_text", "Speech2TextForConditionalGeneration",
           {**_BART, "input_feat_per_channel": 16, "input_channels": 1, "conv_channels": 32,
            "max_source_positions": 64, "max_target_positions": 64},
           lambda: {"input_features": torch.randn(2, 40, 16),
                    "decoder_input_ids": torch.randint(5, 90, (2, 7)), "use_cache": False}),
    Family("llava", "LlavaForConditionalGeneration",
           {"text_config": {"model_type": "llama", **_GQA},
            "vision_config": {"model_type": "clip_vision_model", **_IMAGE},
            "image_token_id": 98}, _image_and_words),
    Family("paligemma", "PaliGemmaForConditionalGeneration",
           {"text_config": {"model_type": "gemma", **_GQA_DIM},
            "vision_config": {"model_type": "siglip_vision_model", **_IMAGE},
            "image_token_id": 98, "projection_dim": 64}, _image_and_words),
    Family("time_series", "PatchTSTForPrediction",
           {"num_input_channels": 3, "context_length": 32, "patch_length": 8, "patch_stride": 8,
            "d_model": 32, "num_attention_heads": 4, "ffn_dim": 64, "num_hidden_layers": 2,
            "prediction_length": 4, "loss": "mse"},
           lambda: {"past_values": torch.randn(2, 32, 3)}, "prediction_outputs"),
)  # fmt: skip

_VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 32, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage4"],
}
_QWEN_TEXT = {
    **_GQA,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
_DETR = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_queries": 9,
    "num_labels": 3,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}


def _patches_and_words() -> dict[str, Tensor]:
    """A prompt for each of two images of 4 x 4 patches, of which 2 x 2 are one token (98)."""
    ids = torch.cat(
        [torch.full((2, 1), 96), torch.full((2, 4), 98), torch.randint(5, 90, (2, LENGTH))], 1
    )
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 98).int(),
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "use_cache": False,
    }


def _tiles_and_words() -> dict[str, Tensor]:
    """A prompt with one image of 4 x 4 patches, of which 2 x 2 are one token (98)."""
    ids = torch.cat([torch.full((2, 4), 98), torch.randint(5, 90, (2, LENGTH))], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 1, 3, PIXELS, PIXELS),
            "use_cache": False}  # fmt: skip


def _merged_and_words() -> dict[str, Tensor]:
    """As before, images without tiles."""
    return {**_tiles_and_words(), **_pixels()}


WANTED = (
    Family("smolvlm", "SmolVLMForConditionalGeneration",
           {"text_config": {"model_type": "llama", **_GQA},
            "vision_config": {**_IMAGE}, "scale_factor": 2, "image_token_id": 98},
           _tiles_and_words),
    Family("idefics3", "Idefics3ForConditionalGeneration",
           {"text_config": {"model_type": "llama", **_GQA},
            "vision_config": {**_IMAGE}, "scale_factor": 2, "image_token_id": 98},
           _tiles_and_words),
    Family("internvl", "InternVLForConditionalGeneration",
           {"text_config": {"model_type": "qwen2", **_GQA},
            "vision_config": {**_IMAGE, "image_size": [PIXELS, PIXELS], "patch_size": [8, 8]},
            "image_token_id": 98, "image_seq_length": 4}, _merged_and_words),
    Family("llava_next", "LlavaNextForConditionalGeneration",
           {"text_config": {"model_type": "llama", **_GQA},
            "vision_config": {"model_type": "clip_vision_model", **_IMAGE},
            "image_grid_pinpoints": [[32, 32]], "image_token_index": 98, "image_token_id": 98},
           lambda: {"input_ids": torch.cat([torch.full((2, 36), 98),
                                            torch.randint(5, 90, (2, LENGTH))], 1),
                    "pixel_values": torch.randn(2, 2, 3, PIXELS, PIXELS),
                    "image_sizes": torch.tensor([[32, 32], [32, 32]]), "use_cache": False}),
    Family("qwen2_vl", "Qwen2VLForConditionalGeneration",
           {"text_config": _QWEN_TEXT,
            "vision_config": {"embed_dim": 64, "depth": 2, "num_heads": 4, "hidden_size": 64,
                              "patch_size": 8, "mlp_ratio": 2},
            "image_token_id": 98, "vision_start_token_id": 96}, _patches_and_words),
    Family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration",
           {"text_config": _QWEN_TEXT,
            "vision_config": {"hidden_size": 64, "depth": 2, "num_heads": 4, "patch_size": 8,
                              "intermediate_size": 96, "out_hidden_size": 64, "window_size": 16,
                              "fullatt_block_indexes": [1]},
            "image_token_id": 98, "vision_start_token_id": 96}, _patches_and_words),
    Family("qwen3_vl", "Qwen3VLForConditionalGeneration",
           {"text_config": _QWEN_TEXT,
            "vision_config": {"hidden_size": 64, "depth": 2, "num_heads": 4, "patch_size": 8,
                              "intermediate_size": 96, "out_hidden_size": 64,
                              "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            "image_token_id": 98, "vision_start_token_id": 96}, _patches_and_words),
    Family("gemma3_vlm", "Gemma3ForConditionalGeneration",
           {"text_config": {**_GQA_DIM},
            "vision_config": {"model_type": "siglip_vision_model", **_IMAGE},
            "mm_tokens_per_image": 4, "image_token_index": 98, "image_token_id": 98},
           lambda: {**_merged_and_words(), "token_type_ids": torch.zeros(2, 16).long()}),
    Family("detr", "DetrForObjectDetection", {**_DETR, "backbone_config": _RESNET},
           _pixels, ("logits", "pred_boxes")),
    Family("conditional_detr", "ConditionalDetrForObjectDetection",
           {**_DETR, "backbone_config": _RESNET}, _pixels, ("logits", "pred_boxes")),
    Family("deformable_detr", "DeformableDetrForObjectDetection",
           {**_DETR, "num_feature_levels": 3,
            "backbone_config": {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]}},
           lambda: {"pixel_values": torch.randn(2, 3, 64, 64)}, ("logits", "pred_boxes")),
    Family("sam", "SamModel",
           {"vision_config": {**_IMAGE, "mlp_dim": 96, "output_channels": 32, "window_size": 2,
                              "global_attn_indexes": [1], "num_pos_feats": 16},
            "prompt_encoder_config": {"hidden_size": 32, "image_size": PIXELS, "patch_size": 8,
                                      "mask_input_channels": 8},
            "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 48, "num_attention_heads": 2,
                                    "num_hidden_layers": 2, "iou_head_hidden_dim": 24}},
           lambda: {**_pixels(), "input_points": torch.rand(2, 1, 2, 2) * 30},
           ("iou_scores", "pred_masks")),
    Family("dinov3", "DINOv3ViTModel", {**_IMAGE, "num_register_tokens": 0}, _pixels,
           "pooler_output"),
    Family("dinov3_registers", "DINOv3ViTModel", {**_IMAGE, "num_register_tokens": 2}, _pixels,
           "pooler_output"),
    Family("siglip2", "Siglip2Model",
           {"text_config": _TEXT, "vision_config": {**_IMAGE, "num_patches": 16}},
           lambda: {**_masked_words(), "pixel_values": torch.randn(2, 16, 192),
                    "pixel_attention_mask": torch.ones(2, 16).int(),
                    "spatial_shapes": torch.tensor([[4, 4], [4, 4]])}, "logits_per_image"),
    Family("xlm", "XLMForSequenceClassification",
           {"vocab_size": WORDS, "emb_dim": 64, "n_layers": 2, "n_heads": 4}, _masked_words),
    Family("longformer", "LongformerForSequenceClassification",
           {**_TEXT, "attention_window": [4, 4]}, _masked_words),
    Family("reformer", "ReformerModelWithLMHead",
           {"vocab_size": WORDS, "hidden_size": 64, "num_attention_heads": 4, "is_decoder": True,
            "attention_head_size": 16, "feed_forward_size": 96, "axial_pos_shape": (4, 4),
            "axial_pos_embds_dim": (32, 32), "attn_layers": ["local", "lsh"], "num_buckets": 2,
            "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "hash_seed": 0,
            "max_position_embeddings": 16, "num_hidden_layers": 2},
           lambda: {"input_ids": torch.randint(5, 90, (2, 16))}),
    Family("encodec", "EncodecModel",
           {"hidden_size": 32, "num_filters": 8, "codebook_size": 16, "codebook_dim": 32,
            "upsampling_ratios": [4, 2], "num_lstm_layers": 1, "num_residual_layers": 1,
            "target_bandwidths": [24.0], "sampling_rate": 1600},
           lambda: {"input_values": torch.randn(2, 1, 160)}, "audio_values"),
)  # fmt: skip

FAMILIES = (
    *DECODERS, *MIXTURES, *RECURRENT, *ENCODERS, *PAIRS, *VISION, *OTHERS, *WANTED,
)  # fmt: skip
