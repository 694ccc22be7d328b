#!/usr/bin/env bash
# Refresh what scripts/results says of GPUs, as far as the time goes; what was not reached is said and left as it is.
#   bash scripts/measure_gpus.sh SECONDS [RESULTS [proof.py's flags]]
# GPU 0 measures the engine (tests/gpu, bench_reduction.py, bench_capture.py, bench_generate.py), then joins the other
# GPUs, which measure cells of proof.py, many at a time by NVIDIA's multi-process service where it works.
#   MEASURE   of "tests reduction k256 1.7b generate long_tail 8b" (all)
#   WORKERS   of the proof on each GPU (10: each takes up to 10 GB of it)
#   WORK      models and caches of the proof (runs/proof)     LOGS   (runs/logs)
# Needs torch, vLLM and what pyproject.toml names under `student` and `eval`; TEACH_ONCE_PIECES where there is no
# package registry.
set -uo pipefail
cd "$(dirname "$0")"
[ $# -ge 1 ] || { echo "usage: bash scripts/measure_gpus.sh SECONDS [RESULTS [proof.py's flags]]" >&2; exit 2; }
folder() { mkdir -p "$1" && cd "$1" && pwd; }
end=$(($(date +%s) + $1)) results=$(folder "${2:-results}"); shift; shift $(($# > 0))
work=$(folder "${WORK:-../runs/proof}") logs=$(folder "${LOGS:-../runs/logs}") last=$(($(nvidia-smi --list-gpus | wc -l) - 1))
export PYTHONPATH=$(folder ..):$PWD${PYTHONPATH:+:$PYTHONPATH} VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1
left() { echo $((end - $(date +%s))); }
say() { echo "[$(left) s left] $*" | tee -a "$logs/measure.log"; }

step() { # NAME SECONDS_NEEDED COMMAND...
  local name=$1 needs=$2 code; shift 2
  [ "$(left)" -ge "$needs" ] || { say "$name: not started"; return; }
  say "$name: starts"; timeout -s INT "$(left)" "$@" > "$logs/$name.log" 2>&1; code=$?; say "$name: exit $code"
}

engine() { # its processes are forked: what they import was imported before
  export CUDA_VISIBLE_DEVICES=0 VLLM_WORKER_MULTIPROC_METHOD=fork PYTORCH_NVML_BASED_CUDA_CHECK=1
  local capture="python3 bench_capture.py --output $results/capture.csv --documents-per-shard 4 --routes prefill,disk,sketch-disk"
  local generate="python3 bench_generate.py --results $results/generate.csv --arms plain,ours --repeats 2"
  local no_graphs='compilation_config={"cudagraph_mode":"NONE"}'
  for one in ${MEASURE-tests reduction k256 1.7b generate long_tail 8b}; do case $one in
    8b) step 8b 200 $capture --k 64 128 --prompts 384 --engine "$no_graphs" ;;
    1.7b) step 1.7b 180 $capture --shape qwen3-1.7b --prompts 1280 --repeats 3 --engine "$no_graphs" ;;
    reduction) step reduction 40 python3 bench_reduction.py --k 64 256 --output "$results/reduction.csv" ;;
    k256) step k256 90 $capture --routes prefill,rows,disk,sketch-disk --shape qwen3-1.7b --vocabulary 262144 --k 256 --prompts 128 --repeats 1 --engine enforce_eager ;;
    generate) step generate 220 $generate --prompts 3072 --max_tokens 288 ;;
    long_tail) step long_tail 220 $generate --prompts 6144 --max_tokens 1024 --lengths long_tail ;;
    tests) step tests 60 env -u VLLM_WORKER_MULTIPROC_METHOD PYTHON=python3 bash test_gpu.sh ;;
  esac; done
}

proof() { # GPUS FLAGS...: GPUS as CUDA_VISIBLE_DEVICES names them
  local gpus=$1; shift
  CUDA_VISIBLE_DEVICES=$gpus timeout -s INT "$(left)" nice -n 5 python3 proof.py --scale gpu --work "$work" --results "$results/proof.csv" "$@"
}

share() { # the service, for what is started from here on; where it does not work processes take turns
  export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$logs
  trap 'CUDA_MPS_PIPE_DIRECTORY='"$CUDA_MPS_PIPE_DIRECTORY"' timeout 9 nvidia-cuda-mps-control <<< quit > /dev/null 2>&1' EXIT
  nvidia-cuda-mps-control -d > "$logs/mps.log" 2>&1 \
    && CUDA_VISIBLE_DEVICES=$last timeout 90 python3 -c "import torch; torch.ones(1, device='cuda').sum().item()" >> "$logs/mps.log" 2>&1 && return
  say "no multi-process service (see $logs/mps.log)"; unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

cells() { # GPUS COUNT FLAGS...: a device that fails under one process fails under all of the service's: they begin again
  local gpus=$1 workers=$(($2 * ${WORKERS:-10})) first=${1%%,*} tasks; shift 2
  [ "$(left)" -ge 60 ] || return 0
  python3 demo_assets.py teacher student text > "$logs/assets-$first.log" 2>&1 \
    || { say "no models (see $logs/assets-$first.log)"; return 1; }
  for tasks in wikipedia "disfl_qa xsum" "narrative_qa pubmed_qa" "boolq dialogues"; do # made side by side
    proof "$first" --prepare --tasks $tasks "$@" > "$logs/prepare-${tasks%% *}-$first.log" 2>&1 &
  done
  while [ "$(left)" -ge 60 ]; do
    say "cells on GPU $gpus: start"
    proof "$gpus" --workers "$workers" --budget_seconds $(($(left) - 15)) "$@" >> "$logs/cells-$gpus.log" 2>&1 && break
  done
  say "cells on GPU $gpus: done"
}

export OMP_NUM_THREADS=1
engine & measured=$! # vLLM weighs its GPU's memory as it starts: nothing else may begin or end there
[ "$last" -gt 0 ] && { share; cells "$(seq -s, "$last")" "$last" "$@" & }
wait "$measured"
[ "$last" -gt 0 ] || share
cells 0 1 "$@" || exit 1
wait
say "done"
