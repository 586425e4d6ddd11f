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

TRITON: list[TritonCase] = [
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
}
