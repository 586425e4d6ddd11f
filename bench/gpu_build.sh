#!/usr/bin/env bash
# Build fastppo._C in place for the GPU found (FASTPPO_BENCH_DEVICE=cuda), or see that the CPU's is there.
set -eu
python=${PYTHON:-python3}
if [ "${FASTPPO_BENCH_DEVICE:-cuda}" = cpu ]; then
  "$python" -c 'import fastppo._C' 2>/dev/null || FASTPPO_BUILD_CUDA=0 "$python" setup.py -q build_ext --inplace
  exit 0
fi
capability=$(nvidia-smi -i 0 --query-gpu=compute_cap --format=csv,noheader | tr -d .)
[ "$capability" = 90 ] && capability=90a # wgmma and TMA need the "a" target
FASTPPO_BUILD_CUDA=1 FASTPPO_CUDA_ARCHS=$capability "$python" setup.py -q build_ext --inplace
"$python" -c 'from fastppo import _C; assert _C.built_with_cuda, "built without CUDA"; print("built for sm_'"$capability"'")'
