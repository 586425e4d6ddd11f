"""Small random models of every architecture that the tests run on: 2-4 layers, 32-64 wide, 97 words, float32."""

import torch


def _config(name: str):
    import transformers as t

    llama = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    llama |= dict(num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    moe = llama | dict(num_experts_per_tok=2, output_router_logits=False)
    makers = {
        "gpt2": lambda: t.GPT2Config(vocab_size=97, n_positions=128, n_embd=32, n_layer=2, n_head=4, **ids),
        "llama": lambda: t.LlamaConfig(**llama),
        "qwen2": lambda: t.Qwen2Config(**llama),
        "qwen3": lambda: t.Qwen3Config(**llama, head_dim=8),
        "mistral": lambda: t.MistralConfig(**llama, sliding_window=6),
        "gemma2": lambda: t.Gemma2Config(
            **llama, head_dim=8, sliding_window=6, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
        ),
        "phi3": lambda: t.Phi3Config(**llama),
        "olmo2": lambda: t.Olmo2Config(**llama),
        "opt": lambda: t.OPTConfig(
            **(ids | dict(pad_token_id=1)),
            vocab_size=97,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=16,
        ),
        "gpt_neox": lambda: t.GPTNeoXConfig(**{k: x for k, x in llama.items() if k != "num_key_value_heads"}),
        "mixtral": lambda: t.MixtralConfig(**moe, num_local_experts=4, sliding_window=None),
        "qwen2_moe": lambda: t.Qwen2MoeConfig(
            **moe, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
        ),
    }
    return makers[name]()


ARCHITECTURES = (
    *("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "olmo2", "opt", "gpt_neox"),
    *("mixtral", "qwen2_moe"),
)


def tiny(name: str, seed: int = 0, scale: float = 1.0) -> torch.nn.Module:
    """A random model in eval mode. Weights are drawn wide enough that attention and logits are far from uniform."""
    from transformers import AutoModelForCausalLM

    config = _config(name)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if name == "gemma2" else None)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, scale * 0.25)
    return model.eval()
