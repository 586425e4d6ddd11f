"""Tiny language models whose weights follow from their parameter names: the same numbers in every transformers version."""

import zlib

import torch
import transformers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}

# name -> (configuration class, what differs from SIZES)
CAUSAL = {
    "gpt2": ("GPT2Config", {**{k: SIZES[k] for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}}
             | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": None}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "phi3": ("Phi3Config", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "opt": ("OPTConfig", {**{k: v for k, v in SIZES.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 24}),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "cohere": ("CohereConfig", {**GROUPED, "logit_scale": 0.25}),
    "granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "phi": ("PhiConfig", SIZES),  # a bias in the head
    "bloom": ("BloomConfig", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}  # fmt: skip
SEQ2SEQ = {
    "t5": ("T5Config", {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}),
    "bart": ("BartConfig", {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
                            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
                            "decoder_ffn_dim": 48, "max_position_embeddings": 64, "decoder_start_token_id": 2,
                            "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None}),
}  # fmt: skip


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Weights from their names; norms stay near 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = 0.2 * torch.randn(parameter.shape, generator=rng, dtype=torch.float32)
            is_norm_weight = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + noise if is_norm_weight else noise)
    return model


def causal(name: str = "llama", **changes) -> torch.nn.Module:
    config, arguments = CAUSAL[name]
    config = getattr(transformers, config)(**{**arguments, **changes})
    return fill(transformers.AutoModelForCausalLM.from_config(config)).eval()


def seq2seq(name: str = "t5") -> torch.nn.Module:
    config, arguments = SEQ2SEQ[name]
    return fill(transformers.AutoModelForSeq2SeqLM.from_config(getattr(transformers, config)(**arguments))).eval()


def reward_adapter(folder) -> None:
    """A sequence-classification LoRA adapter for causal("llama"), as peft saves it."""
    from peft import LoraConfig, get_peft_model

    config = transformers.LlamaConfig(**{**CAUSAL["llama"][1], "num_labels": 1})
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    fill(get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=8))).save_pretrained(str(folder))
