"""Tiny random-weight models of many transformers types: what "any model" is tested on. Configs only, no weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 96


@dataclass(frozen=True)
class Tiny:
    """architecture: the transformers class; config: its config's arguments; inputs: what kind of sample it takes."""

    architecture: str
    config: dict[str, Any]
    inputs: str = "text"
    expects: int | None = None  # linear layers that a job compresses, where worth stating
    nested: dict[str, dict[str, Any]] = field(default_factory=dict)  # sub-configs, by argument
    format: str = (
        "gptq"  # compressed-tensors where widths are no multiples of 32, as they are in the published sizes too
    )


LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
VIT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

MODELS: dict[str, Tiny] = {
    "llama": Tiny("LlamaForCausalLM", LLAMA, expects=14),
    "mistral": Tiny("MistralForCausalLM", LLAMA, expects=14),
    "qwen2": Tiny("Qwen2ForCausalLM", LLAMA, expects=14),
    "qwen3": Tiny("Qwen3ForCausalLM", LLAMA, expects=14),
    "gemma2": Tiny("Gemma2ForCausalLM", {**LLAMA, "query_pre_attn_scalar": 16, "sliding_window": 8}, expects=14),
    "gemma3": Tiny("Gemma3ForCausalLM", {**LLAMA, "query_pre_attn_scalar": 16, "sliding_window": 8}, expects=14),
    "phi3": Tiny("Phi3ForCausalLM", LLAMA, expects=8),
    "opt": Tiny(
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 64,
        },
        expects=12,
    ),
    "bloom": Tiny(
        "BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}, expects=8
    ),
    "gpt2": Tiny("GPT2LMHeadModel", GPT, expects=8),
    "gpt_neox": Tiny("GPTNeoXForCausalLM", {**LLAMA, "rotary_pct": 0.5}, expects=8),
    "gpt_neo": Tiny(
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 128,
        },
        expects=12,
    ),
    "gptj": Tiny("GPTJForCausalLM", {**GPT, "rotary_dim": 8}, expects=12),
    "falcon": Tiny(
        "FalconForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        expects=8,
    ),
    "mpt": Tiny(
        "MptForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
        expects=8,
    ),
    "stablelm": Tiny("StableLmForCausalLM", LLAMA, expects=14),
    "olmo2": Tiny("Olmo2ForCausalLM", LLAMA, expects=14),
    "starcoder2": Tiny("Starcoder2ForCausalLM", LLAMA, expects=12),
    "cohere2": Tiny("Cohere2ForCausalLM", {**LLAMA, "sliding_window": 8}, expects=14),
    "granite": Tiny("GraniteForCausalLM", LLAMA, expects=14),
    "deepseek_v3": Tiny(
        "DeepseekV3ForCausalLM",
        {
            **LLAMA,
            "head_dim": 32,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "mixtral": Tiny("MixtralForCausalLM", {**LLAMA, **EXPERTS}),
    "qwen3_moe": Tiny(
        "Qwen3MoeForCausalLM",
        {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    "gpt_oss": Tiny("GptOssForCausalLM", {**LLAMA, **EXPERTS, "sliding_window": 8}),
    "llama4": Tiny(
        "Llama4ForCausalLM",
        {**LLAMA, "intermediate_size_mlp": 128, "num_local_experts": 4, "interleave_moe_layer_step": 2},
    ),
    "mamba": Tiny(
        "MambaForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "state_size": 16, "num_hidden_layers": 2, "time_step_rank": 32},
    ),
    "mamba2": Tiny(
        "Mamba2ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "state_size": 16,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 2,
            "chunk_size": 8,
        },
        format="compressed-tensors",
    ),
    "falcon_h1": Tiny(
        "FalconH1ForCausalLM",
        {
            **LLAMA,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 8,
        },
        format="compressed-tensors",
    ),
    "bert": Tiny("BertForMaskedLM", BERT, expects=12),
    "roberta": Tiny("RobertaForMaskedLM", BERT, expects=12),
    "vit": Tiny("ViTForImageClassification", VIT, "image", expects=12),
    "siglip": Tiny(
        "SiglipModel",
        {},
        "image and text",
        nested={"vision_config": VIT, "text_config": {**BERT, "projection_size": 64}},
    ),
    "whisper": Tiny(
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": 16,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_source_positions": 32,
            "max_target_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        "speech",
    ),
    "t5": Tiny(
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "text to text",
    ),
    "bart": Tiny(
        "BartForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "text to text",
    ),
    "llava": Tiny(
        "LlavaForConditionalGeneration",
        {"image_token_index": 3, "image_token_id": 3, "image_seq_length": 16, "vision_feature_layer": -1},
        "image in text",
        expects=14,
        nested={
            "vision_config": {"model_type": "clip_vision_model", **VIT, "projection_dim": 64},
            "text_config": {"model_type": "llama", **LLAMA},
        },
    ),
    "albert": Tiny("AlbertForMaskedLM", {**BERT, "embedding_size": 32, "num_hidden_groups": 1}, expects=6),
    "jamba": Tiny(
        "JambaForCausalLM",
        {
            **{k: v for k, v in LLAMA.items() if k != "head_dim"},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 16,
            "mamba_dt_rank": 32,
            "use_mamba_kernels": False,
        },
    ),
}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """The model with random weights from a fixed seed, float32, eval mode."""
    import transformers

    tiny = MODELS[name]
    kind = getattr(transformers, tiny.architecture)
    torch.manual_seed(seed)
    config = kind.config_class(**tiny.config, **tiny.nested)
    model = kind(config).eval()
    for parameter in model.parameters():  # initializers of 0.02 leave every logit near 0: make differences visible
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.tie_weights()
    return model


def samples(name: str, count: int, length: int = 24, seed: int = 1) -> list[dict[str, Tensor]]:
    """Calibration samples of the model's own kind of input."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int = length) -> Tensor:
        return torch.randint(4, VOCABULARY, (1, n), generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kinds = {
        "text": lambda: {"input_ids": ids()},
        "image": lambda: {"pixel_values": normal(1, 3, 32, 32)},
        "image and text": lambda: {"pixel_values": normal(1, 3, 32, 32), "input_ids": ids(16)},
        "speech": lambda: {"input_features": normal(1, 16, 64), "decoder_input_ids": ids(12)},
        "text to text": lambda: {"input_ids": ids(), "decoder_input_ids": ids(12)},
        "image in text": lambda: {
            "pixel_values": normal(1, 3, 32, 32),
            "input_ids": torch.cat([torch.full((1, 16), 3), ids(12)], 1),
        },
    }
    return [kinds[MODELS[name].inputs]() for _ in range(count)]


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Tokens, the same at every call, none of them special."""
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(module: nn.Module, ids: Tensor) -> Tensor:
    """[batch, tokens, vocabulary], float32, of all tokens at once."""
    with torch.inference_mode():
        found: Tensor = module(input_ids=ids).logits.float()
    return found
