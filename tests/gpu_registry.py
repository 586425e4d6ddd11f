"""Every GPU kernel and how it is launched, for the compile gates (test_gpu_compile.py): add a line with a new kernel.

WIDE: the kernel is meant to load 16 bytes at a time. TENSOR_CORES: its products run on wgmma.
"""

from gpu_compile import TritonCase

WIDE = r"LDG\.E(\.\w+)*\.128"
TENSOR_CORES = r"\bHGMMA\b"

_PPO_LOSS = {
    **{name: True for name in ("HAS_MASK", "HAS_ENTROPY", "GRAD", "DUAL", "COUNT")},
    **{"WHITEN": 2, "BLOCK": 1024, "BLOCK_G": 128},
}

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

TRITON: list[TritonCase] = [
    *(
        TritonCase(
            "fastppo.kernels._sampling_triton:sampling_kernel",
            _SAMPLING_TYPES.format(kind, "fp32" if filters else kind),
            {**_SAMPLING, "TOP_K": filters, "TOP_P": filters},
            warps=8,
        )
        for kind in ("fp32", "bf16")
        for filters in (False, True)
    ),
    *(
        TritonCase(
            "fastppo.kernels._paged_attention_triton:paged_attention_kernel",
            _PAGED_TYPES.format(kind),
            {**_PAGED, "D": D, "D_PADDED": D},
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
    ),
    *(
        TritonCase(
            "fastppo.kernels._logit_rows:stats_kernel",
            _STATS.format(kind),
            {**_LOGITS, "CONTINUE": more, "FINISH": not more, "BIAS": more, "CAP": more},
            warps=8,
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
        )
        for kind in ("fp32", "bf16", "fp16")
        for more in (False, True)
    ),
    TritonCase("fastppo.kernels.gae:_gae_kernel", _GAE_TYPES, _GAE),
    TritonCase("fastppo.kernels.gae:_gae_kernel", _GAE_TYPES, {**_GAE, "PACKED": True, "MASKED": 2, "SHAPED": False}),
    TritonCase(
        "fastppo.kernels.kl_reward:_kl_reward_kernel",
        "*fp32 *fp32 *i1 *fp32 *fp32 *fp32 *fp32 i32 fp32",
        {"KIND": 3, "BLOCK": 1024},
    ),
    TritonCase(
        "fastppo.kernels.ppo_loss:_ppo_loss_kernel",
        "*fp32 " * 7 + "*i1 " + "*fp32 " * 4 + "*i32 " + "*fp32 " * 4 + "i32 i32 " + "fp32 " * 9,
        _PPO_LOSS,
    ),
]

# file stem -> instructions that some kernel of the file must use on sm_90a
CUDA_WANTS: dict[str, tuple[str, ...]] = {
    "gae": (WIDE,),
    "logprob": (WIDE,),
    "paged_attention": (WIDE,),
    "sampling": (WIDE,),
}
