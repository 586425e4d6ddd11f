"""What the engine needs to know of a transformers model: its matrices, norms and the shape of its attention.

GPT-2, Llama, Mistral, Qwen2 and Qwen3 are read; `read` returns the reason where a model is anything else. Nothing is
copied: the fields are the model's own parameters.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from fastppo.attention import unwrap
from fastppo.engine.kernels import GATED, GELU, Heads, Norm


class Matrix:
    """y = x W^T + b. `turned`: the parameter is W^T, [inputs, outputs]."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, turned: bool = False):
        self.weight, self.bias, self.turned = weight, bias, turned
        self.inputs, self.outputs = weight.shape if turned else reversed(weight.shape)


@dataclass(eq=False)
class Block:
    """x += out(attention(qkv(norm1(x))));  x += down(activation(up(norm2(x)))). qkv, up: side by side."""

    norm1: Norm
    qkv: list[Matrix]
    out: Matrix
    norm2: Norm
    up: list[Matrix]
    down: Matrix
    heads: Heads
    activation: int
    head_norms: tuple[Norm, Norm] | None = None  # of each query and key head (Qwen3)

    @property
    def past_attention(self) -> list[Matrix]:
        return [self.out, *self.up, self.down]


@dataclass(eq=False)
class Spec:
    tokens_VD: nn.Parameter
    positions_PD: nn.Parameter | None
    rotary: nn.Module | None
    blocks: list[Block] = field(default_factory=list)
    norm: Norm | None = None
    padding: int | None = None  # the token whose embedding gets no gradient

    def parameters(self):
        """Every parameter below the head."""
        yield self.tokens_VD
        if self.positions_PD is not None:
            yield self.positions_PD
        for block in self.blocks:
            norms = [block.norm1, block.norm2, *(block.head_norms or ())]
            for f in norms:
                yield from (p for p in (f.weight_D, f.bias_D) if p is not None)
            for matrix in (*block.qkv, block.out, *block.up, block.down):
                yield from (p for p in (matrix.weight, matrix.bias) if p is not None)
        yield from (p for p in (self.norm.weight_D, self.norm.bias_D) if p is not None)

    def neighbours(self) -> list[list[nn.Parameter | None]]:
        """Parameters whose gradients come as one matrix (or one vector: biases)."""
        sides = [side for block in self.blocks for side in (block.qkv, block.up) if len(side) > 1]
        return [part for side in sides for part in ([m.weight for m in side], [m.bias for m in side])]


class _Unknown(Exception):
    """The model has something that the engine does not compute."""


def read(model: nn.Module) -> Spec | str:
    """The Spec of `model` (a causal LM or a sequence classifier, perhaps in wrappers), or why it has none."""
    inner = unwrap(model)
    reader = READERS.get(f"{type(inner).__module__}.{type(inner).__name__}")
    if reader is None:
        return f"{type(inner).__name__} is not one of the models it knows"
    try:
        _plain(inner)
        spec = reader(inner)
    except (_Unknown, AttributeError) as error:
        return f"{type(inner).__name__}: {error}"
    odd = next((p for p in spec.parameters() if p.dtype != torch.float32 or p.device.type != "cpu"), None)
    if odd is not None:
        return f"its parameters are {odd.dtype} on {odd.device}, not float32 on the CPU"
    if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in spec.parameters()):
        return f"{type(inner).__name__} has hooks on gradients"
    contiguous = all(p.is_contiguous() for p in spec.parameters())
    return spec if contiguous else f"{type(inner).__name__} has parameters that are not contiguous"


def _plain(model: nn.Module) -> None:
    """Raise _Unknown where a module does not run the code of its class: hooks, patched forwards, adapters."""
    for name, module in model.named_modules():
        hooks = (
            *module._forward_hooks,
            *module._forward_pre_hooks,
            *module._backward_hooks,
            *module._backward_pre_hooks,
        )
        if hooks or "forward" in module.__dict__:
            raise _Unknown(f"{name or 'the model'} has hooks or a forward of its own")
        if getattr(module, "gradient_checkpointing", False) and module.training:
            raise _Unknown("gradient checkpointing is on")


def _norm(module: nn.Module) -> Norm:
    if type(module) is nn.LayerNorm:
        if module.weight is None:
            raise _Unknown("a LayerNorm without weights")
        return Norm(module.weight, module.bias, module.eps, True)
    if type(module).__name__ not in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"):
        raise _Unknown(f"a {type(module).__name__}")
    return Norm(module.weight, None, module.variance_epsilon, False)


def _conv(module: nn.Module) -> Matrix:
    if type(module).__name__ != "Conv1D":
        raise _Unknown(f"a {type(module).__name__} in place of a Conv1D")
    return Matrix(module.weight, module.bias, turned=True)


def _linear(module: nn.Module) -> Matrix:
    if type(module) is not nn.Linear:
        raise _Unknown(f"a {type(module).__name__} in place of a Linear")
    return Matrix(module.weight, module.bias)


def _gpt2(model: nn.Module) -> Spec:
    config, body = model.config, model.transformer
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn:
        raise _Unknown("attention is scaled in another way")
    if config.add_cross_attention:
        raise _Unknown("it has cross-attention")
    spec = Spec(body.wte.weight, body.wpe.weight, None, padding=body.wte.padding_idx)
    for layer in body.h:
        if type(layer).__name__ != "GPT2Block":
            raise _Unknown(f"a {type(layer).__name__}")
        act = layer.mlp.act
        if type(act).__name__ not in ("NewGELUActivation", "GELUTanh"):
            raise _Unknown(f"activation {type(act).__name__}")
        attn = layer.attn
        heads = Heads(attn.num_heads, attn.num_heads, attn.head_dim, attn.head_dim**-0.5, None)
        spec.blocks.append(
            Block(
                _norm(layer.ln_1),
                [_conv(attn.c_attn)],
                _conv(attn.c_proj),
                _norm(layer.ln_2),
                [_conv(layer.mlp.c_fc)],
                _conv(layer.mlp.c_proj),
                heads,
                GELU,
            )
        )
    spec.norm = _norm(body.ln_f)
    return spec


def _llama(model: nn.Module) -> Spec:
    config, body = model.config, model.model
    spec = Spec(body.embed_tokens.weight, None, body.rotary_emb, padding=body.embed_tokens.padding_idx)
    for layer in body.layers:
        attn, mlp = layer.self_attn, layer.mlp
        if type(layer).__name__.removesuffix("DecoderLayer") not in ("Llama", "Mistral", "Qwen2", "Qwen3"):
            raise _Unknown(f"a {type(layer).__name__}")
        if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            raise _Unknown(f"activation {type(mlp.act_fn).__name__}")
        D = attn.head_dim
        window = getattr(attn, "sliding_window", None)
        if window is None and type(layer).__name__.startswith("Mistral"):
            window = config.sliding_window
        K = config.num_key_value_heads
        head_norms = (_norm(attn.q_norm), _norm(attn.k_norm)) if hasattr(attn, "q_norm") else None
        spec.blocks.append(
            Block(
                _norm(layer.input_layernorm),
                [_linear(x) for x in (attn.q_proj, attn.k_proj, attn.v_proj)],
                _linear(attn.o_proj),
                _norm(layer.post_attention_layernorm),
                [_linear(mlp.gate_proj), _linear(mlp.up_proj)],
                _linear(mlp.down_proj),
                Heads(config.num_attention_heads, K, D, attn.scaling, window),
                GATED,
                head_norms,
            )
        )
    spec.norm = _norm(body.norm)
    return spec


_FAMILY = ("llama.modeling_llama.Llama", "mistral.modeling_mistral.Mistral")
_FAMILY += ("qwen2.modeling_qwen2.Qwen2", "qwen3.modeling_qwen3.Qwen3")
_HEADS = ("ForCausalLM", "ForSequenceClassification")  # the body is the same
READERS = {f"transformers.models.{name}{head}": _llama for name in _FAMILY for head in _HEADS}
READERS |= {f"transformers.models.gpt2.modeling_gpt2.GPT2{head}": _gpt2 for head in ("LMHeadModel", _HEADS[1])}
