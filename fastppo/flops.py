"""The arithmetic that a PPO step needs, and what the machine can do: model FLOP utilisation (MFU).

    forward of a token   2 * (matrix weights of the backbone) + 2 * layers * width * (position + 1)  [causal attention: q k and p v]
    head of a response token   2 V D           training   3 forwards (2 where the backbone is frozen, as with LoRA)

Needed FLOPs only: no padding, nothing recomputed, at prompt tokens no head and, in models that the engine knows, none of the
last block's matrices past its attention. Suffixes: V vocabulary, D hidden.
"""

import functools
import time
from typing import NamedTuple

import torch

from fastppo.kernels import _recycle


class Cost(NamedTuple):
    """FLOPs of one forward: per token, per token and position in its sequence, per response token."""

    token: float
    token_position: float
    response: float
    trained: float  # forwards that a training pass costs

    def forward(self, lengths: list[int], responses: list[int]) -> float:
        attention = sum(n * (n + 1) / 2 for n in lengths)
        return self.token * sum(lengths) + self.token_position * attention + self.response * sum(responses)


def cost(model, head: torch.nn.Module) -> Cost:
    """model: a transformers model that can be packed, perhaps in wrappers; head: the layer that reads its hidden states."""
    from fastppo.attention import unwrap
    from fastppo.engine.spec import read
    from fastppo.models.head import backbone

    spec = read(model)
    top = 0.0 if isinstance(spec, str) else 2.0 * sum(m.weight.numel() for m in spec.blocks[-1].past_attention)
    inner = unwrap(model)
    tables = inner.get_input_embeddings(), inner.get_output_embeddings()  # a classifier has no output embeddings
    embeddings = {id(layer.weight) for layer in tables if layer is not None}
    matrices = [p for p in backbone(model).parameters() if p.dim() >= 2 and id(p) not in embeddings]
    # PEFT's wrappers hold several, and say which acts
    read = [head.weight] if hasattr(head, "weight") else [p for p in head.parameters() if p.dim() >= 2]
    config = inner.config.get_text_config()
    adapted = getattr(model, "is_peft_model", False) or hasattr(model, "peft_config")
    frozen = adapted or not any(p.requires_grad for p in inner.parameters() if p.dim() >= 2)
    return Cost(
        token=2.0 * sum(map(_count, matrices)) - top,
        token_position=4.0 * config.num_hidden_layers * config.hidden_size,
        response=2.0 * sum(map(_count, read)) + top,
        trained=2.0 if frozen else 3.0,
    )


def policy_cost(model) -> Cost:
    """Of a language model."""
    from fastppo.attention import unwrap

    return cost(model, unwrap(model).get_output_embeddings())


def _count(parameter: torch.Tensor) -> int:
    """Numbers of the whole parameter; ZeRO-3 leaves an empty tensor of it."""
    return getattr(parameter, "ds_numel", parameter.numel())


@functools.cache
def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """The rate of torch's matrix product here, best of at least five in 0.2 s; measured once. threads only keys the cache."""
    n = 8192 if device.type == "cuda" else 1024
    own = torch.Generator(device).manual_seed(0)  # the run's own draws stay what they are
    # on a CPU where the stages before had their numbers: 12 MB that would come on top
    shape, place = (3, n, n), _recycle.WEIGHTS_OR_GRADIENTS
    on_cpu = device.type == "cpu"
    made = _recycle.of_stage(place, shape, dtype) if on_cpu else torch.empty(shape, dtype=dtype, device=device)
    a, b, out = made.normal_(generator=own)
    best, count, began = float("inf"), 0, time.perf_counter()
    while count < 5 or time.perf_counter() - began < 0.2:
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def utilisation(
    prepare: tuple[float, float], optimise: tuple[float, float], device: torch.device, mixed_precision: str
) -> dict[str, float]:
    """fastppo/: MFU of both stages, from the (needed FLOPs, seconds) of each, and the rate that it is a share of."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
    rate = matmul_flops_per_s(device, dtype, torch.get_num_threads())
    shares = {
        f"fastppo/{name}_mfu": flops / max(seconds, 1e-9) / rate
        for name, (flops, seconds) in {"prepare": prepare, "optimise": optimise}.items()
    }
    return shares | {"fastppo/matmul_flops_per_s": rate}
