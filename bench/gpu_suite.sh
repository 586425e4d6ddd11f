#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in order of value: build, tests, sanitizer, ceilings, kernels, rollout, loop, learning.
#
#   bench/gpu_suite.sh OUT [--device cuda|cpu] [--quick] [--dry-run] [--budget SECONDS] [--only PART,PART,...]
#
# OUT gets summary.md, rows.csv, status.csv and log.txt. A part that succeeded is skipped by the next call with the same OUT (copy the
# folder along); one that failed or ran out of time runs again. --budget: stop starting parts after so many seconds. --quick: tiny
# shapes. --dry-run: print the parts and their commands. --device cpu: the same flow without a GPU; its rows say so.
# Exit code: 0 when every part of the call has succeeded, now or earlier; else 1. Reads nothing outside the tree, needs no network.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 2
device=cuda quick="" dry="" budget=86400 only="" out=""
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=$2; shift ;;
    --budget) budget=$2; shift ;;
    --only) only=,$2,; shift ;;
    --quick) quick=--quick ;;
    --dry-run) dry=1 ;;
    -*) echo "gpu_suite: no option $1 (see the head of $0)" >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
[ -n "$out" ] || { sed -n 2,9p "$0" >&2; exit 2; }
case $device in cuda | cpu) ;; *) echo "gpu_suite: --device must be cuda or cpu; got $device" >&2; exit 2 ;; esac

python=${PYTHON:-python3}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=passive
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # compute-sanitizer lies beside nvcc
[ -z "$dry" ] && mkdir -p "$out" && out=$(cd "$out" && pwd)
status=$out/status.csv log=$out/log.txt
rows=$(mktemp -d) && trap 'rm -rf "$rows"' EXIT
export FASTPPO_BENCH_RESULTS=$rows
started=$SECONDS failed=0

clocks() { # "SM MHz / memory MHz / watts / degrees" of the first GPU
  [ "$device" = cuda ] || { echo cpu; return; }
  nvidia-smi -i 0 --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv,noheader,nounits | sed 's/, */\//g'
}

part() { # NAME LIMIT_SECONDS COMMAND...
  local name=$1 limit=$2 left rc before after begin
  shift 2
  [ -z "$only" ] || case $only in *,"$name",*) ;; *) return ;; esac
  if [ -n "$dry" ]; then printf '%-22s %4ss  %s\n' "$name" "$limit" "$*"; return; fi
  if grep -q "^$name,0," "$status" 2>/dev/null; then echo "== $name: done before"; return; fi
  left=$((budget - (SECONDS - started)))
  if [ "$left" -lt 20 ]; then echo "== $name: left for the next call"; failed=1; return; fi
  [ "$left" -gt "$limit" ] && left=$limit
  echo "== $name (at most $left s): $*"
  rm -f "$rows"/*.csv
  before=$(clocks) begin=$SECONDS
  printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
  timeout -k 10 "$left" "$@" >>"$log" 2>&1
  rc=$?
  after=$(clocks)
  [ $rc -eq 0 ] || { failed=1; echo "   failed with $rc; the end of its log:"; tail -n 15 "$log" | sed 's/^/   | /'; }
  "$python" bench/gpu_rows.py merge "$out" "$rows" "$name" "$rc" "$((SECONDS - begin))" "$left" "$before" "$after" || failed=1
}

bench() { # NAME LIMIT SCRIPT ARGUMENTS...: a bench that takes the suite's device and size
  local name=$1 limit=$2 script=$3
  shift 3
  # --quick writes no rows in an ordinary bench; here they show that the flow works
  part "$name" "$limit" "$python" "bench/$script" --device "$device" ${quick:+--quick --keep-rows} "$@"
}

sanitizer() { # TOOL BACKEND
  local tool=()
  [ "$device" = cuda ] && tool=(compute-sanitizer --tool "$1" --error-exitcode 9 --launch-timeout 300)
  part "$1-$2" 600 "${tool[@]}" "$python" bench/gpu_sanitize.py --device "$device" --backend "$2"
}

own=cpu
[ "$device" = cuda ] && own=cuda
part build 600 env FASTPPO_BENCH_DEVICE=$device bash bench/gpu_build.sh
part environment 120 "$python" bench/gpu_rows.py environment "$device"
tests="tests/test_logprob.py tests/test_linear_logprob.py tests/test_linear_ppo_loss.py tests/test_gae.py tests/test_kl_reward.py"
tests="$tests tests/test_ppo_loss.py tests/test_sampling.py tests/test_paged_attention.py tests/test_linear_stats.py"
[ -n "$quick" ] && tests="tests/test_kl_reward.py"
workers=$("$python" -c 'import xdist; print("-n 8")' 2>/dev/null)
[ "$device" = cpu ] && workers=""
part tests 600 "$python" -m pytest -q -p no:cacheprovider -m gpu -rs $workers $tests
[ "$device" = cuda ] && part tests-generation 600 "$python" -m pytest -q -p no:cacheprovider -rs tests/test_gpu_generation.py
bench ceilings 120 gpu_ceilings.py
for name in logprob linear_logprob linear_ppo_loss sampling paged_attention gae ppo_loss kl_reward; do
  bench "bench-$name" 300 "bench_$name.py"
done
for tool in memcheck racecheck; do
  sanitizer $tool $own
  [ "$device" = cpu ] || sanitizer $tool triton
done
bench peers 600 gpu_peers.py
models="qwen3-0.6b qwen3-1.7b llama3-8b" batches="32 256 1" loops="qwen3-0.6b qwen3-1.7b llama3-8b-lora"
[ -n "$quick" ] && models=llama3-8b batches=32 loops="qwen3-0.6b llama3-8b-lora" # tiny ones, all alike
for model in $models; do
  for batch in $batches; do bench "rollout-$model-$batch" 600 gpu_rollout.py --model "$model" --batch "$batch"; done
done
for model in $loops; do bench "loop-$model" 600 gpu_loop.py --model "$model"; done
bench learning 600 gpu_learning.py

[ -n "$dry" ] && exit 0
"$python" bench/gpu_rows.py summary "$out" || failed=1
exit $failed
