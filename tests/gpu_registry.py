"""Every GPU kernel and how it is launched, for the compile gates (test_gpu_compile.py): add a line with a new kernel.

WIDE: loads of 16 bytes; ASYNC: the same into shared memory, past the registers; TMA: by the tensor copy engine. WGMMA, MMA: products on
the tensor cores, of Hopper and of Ampere. A memory-bound kernel must be WIDE for aligned shapes (`sixteens`); where rows begin
anywhere (packed sequences, odd vocabularies) it can't be.
"""

from gpu_compile import TritonCase

WIDE = r"LDG\.E(\.\w+)*\.128"
ASYNC = r"LDGSTS\.E(\.\w+)*\.128"
TMA, WGMMA, MMA = r"\bUTMALDG\b", r"\bHGMMA\b", r"\bHMMA\b"
BOTH_WIDE = {"wants_80": (WIDE,), "wants_90": (WIDE,)}

_PPO_LOSS = {
    **{name: True for name in ("HAS_MASK", "HAS_ENTROPY", "GRAD", "DUAL", "COUNT")},
    **{"WHITEN": 2, "BLOCK": 1024, "BLOCK_G": 128},
}

_ROWS = ("outer_stride", "inner_stride", "d_outer_stride", "d_inner_stride", "columns", "first")
_LOGITS = dict(BIAS=False, CAP=False, BLOCK=4096)
_STATS = "*{0} *fp32 *i64 *fp32 *fp32 *fp32 *fp32 i32 i64 i64 i32 i32 fp32 fp32"
_GRAD = "*{0} *{0} *fp32 *i64 *fp32 *fp32 *fp32 *fp32 i32 i64 i64 i32 i64 i64 i32 i32 fp32 fp32 fp32"

_GAE = {
    **{name: True for name in ("SHAPED", "HAS_MASK")},
    **{"KIND": 3, "MASKED": 0, "PACKED": False, "BLOCK": 1024, "BLOCK_B": 128},
}
_GAE_TYPES = "*fp32 " * 4 + "*i1 *fp32 *i32 " + "*fp32 " * 4 + "*i32 *fp32 i32 i32 fp32 fp32 fp32"

_SAMPLING_TYPES = "*{0} *{1} *i64 *i64 *i64 *fp32 i32 i32 i32 i32 fp32 fp32 fp32 fp32 fp32"
_SAMPLING = {"GREEDY": False, "TILE": 1024, "TILES": 256}

_PAGED_TYPES = "*{0} *{0} *{0} *i32 *i32 *fp32 i32 i32 i32 i32 fp32 fp32 i32"
_PAGED = {"KV": 8, "GROUP": 4, "BLOCK": 16, "SPLIT": 256, "GROUP_PADDED": 16, "STEP": 64}


def _linear_stats(kind: str, more: bool, tma: bool) -> TritonCase:
    """The fused forward: with TMA on Hopper alone, in wider tiles; more: bias and soft cap."""
    tensors, columns = f"*{kind} *{kind}", 128
    if tma:
        tensors, columns = f"tensordesc<{kind}[128,64]> tensordesc<{kind}[256,64]>", 256
    return TritonCase(
        "fastppo.kernels._linear_stats_triton:linear_stats_kernel",
        f"{tensors} *fp32 *i64 *fp32 i32 i32 i32 fp32 fp32",
        {"BIAS": more, "CAP": more, "SPLIT": 4096, "TMA": tma, "ROWS": 128, "COLUMNS": columns, "DEPTH": 64},
        warps=8,
        sixteens=("D",),
        archs=(90,) if tma else (80, 90),
        wants_80=() if tma else (ASYNC, MMA),
        wants_90=(TMA if tma else ASYNC, WGMMA),
        label=", ".join([*([f"{kind} TMA"] if tma else []), *(["bias, cap"] if more else [])]),
    )


TRITON: list[TritonCase] = [
    *(
        TritonCase(
            "fastppo.kernels._sampling_triton:sampling_kernel",
            _SAMPLING_TYPES.format(kind, "fp32" if filters else kind),
            {**_SAMPLING, "TOP_K": filters, "TOP_P": filters},
            warps=8,
            sixteens=("V", "x_stride", "y_stride"),
            label="filters" if filters else "",
            **(BOTH_WIDE if kind == "fp32" else {}),  # a tile of 1024 over 8 warps is 8 bytes a thread in 16 bits
        )
        for kind in ("fp32", "bf16")
        for filters in (False, True)
    ),
    *(
        TritonCase(
            "fastppo.kernels._paged_attention_triton:paged_attention_kernel",
            _PAGED_TYPES.format(kind),
            {**_PAGED, "D": D, "D_PADDED": D},
            sixteens=("q_row", "q_head"),
            wants_80=(ASYNC,) if kind == "fp32" else (ASYNC, MMA),
            wants_90=(ASYNC,) if kind == "fp32" else (ASYNC, MMA),  # 16 query heads are too few rows for wgmma
        )
        for kind, D in (("fp32", 64), ("bf16", 128), ("fp16", 256))
    ),
    TritonCase(
        "fastppo.kernels._paged_attention_triton:merge_kernel",
        "*fp32 *i32 *bf16 i32",
        {"H": 32, "D": 128, "SPLIT": 256, "D_PADDED": 128},
        warps=1,
    ),
    TritonCase(
        "fastppo.kernels._paged_attention_triton:cache_write_kernel",
        "*bf16 *bf16 *bf16 *bf16 *i64 i32 i32 i32 i32",
        {"KV": 8, "D": 128, "PADDED": 1024},
        sixteens=("k_token", "k_head", "v_token", "v_head"),
        **BOTH_WIDE,
    ),
    *(
        TritonCase(
            "fastppo.kernels._logit_rows:stats_kernel",
            _STATS.format(kind),
            {**_LOGITS, "CONTINUE": more, "FINISH": not more, "BIAS": more, "CAP": more},
            warps=8,
            sixteens=_ROWS,
            label="bias, cap" if more else "",
            **BOTH_WIDE,
        )
        for kind in ("fp32", "bf16", "fp16")
        for more in (False, True)
    ),
    *(
        TritonCase(
            "fastppo.kernels._logit_rows:grad_kernel",
            _GRAD.format(kind),
            {**_LOGITS, "BIAS": more, "CAP": more},
            warps=8,
            sixteens=_ROWS,
            label="bias, cap" if more else "",
            **BOTH_WIDE,
        )
        for kind in ("fp32", "bf16", "fp16")
        for more in (False, True)
    ),
    TritonCase("fastppo.kernels._gae_triton:gae_kernel", _GAE_TYPES, _GAE, sixteens=("T",), **BOTH_WIDE),
    TritonCase(
        "fastppo.kernels._gae_triton:gae_kernel",
        _GAE_TYPES,
        {**_GAE, "PACKED": True, "MASKED": 2, "SHAPED": False},
        label="packed",
    ),
    TritonCase(
        "fastppo.kernels.kl_reward:_kl_reward_kernel",
        "*fp32 *fp32 *i1 *fp32 *fp32 *fp32 *fp32 i32 fp32",
        {"KIND": 3, "BLOCK": 1024},
        sixteens=("T",),
        **BOTH_WIDE,
    ),
    TritonCase(
        "fastppo.kernels._ppo_loss_triton:ppo_loss_kernel",
        "*fp32 " * 7 + "*i1 " + "*fp32 " * 4 + "*i32 " + "*fp32 " * 4 + "i32 i32 " + "fp32 " * 9,
        _PPO_LOSS,
        sixteens=("N",),
        **BOTH_WIDE,
    ),
    *(_linear_stats(kind, more, tma) for tma in (False, True) for kind in ("bf16", "fp16") for more in (False, True)),
]

# kernel -> instructions that each of its instances must use; a store of 16 bytes where the kernel writes rows
WIDE_STORE = r"STG\.E(\.\w+)*\.128"
CUDA_WANTS: dict[str, tuple[str, ...]] = {
    "logprob_forward_kernel": (WIDE,),
    "logprob_backward_kernel": (WIDE, WIDE_STORE),
    "gae_kernel": (WIDE, WIDE_STORE),
    "sampling_kernel": (WIDE,),
    "paged_attention_kernel": (WIDE,),
    "paged_merge_kernel": (),  # a column a thread: 512 contiguous bytes a part
    "cache_write_kernel": (WIDE, WIDE_STORE),
}
