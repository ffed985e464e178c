#!/usr/bin/env bash
# Check and measure this package on one NVIDIA GPU in a quarter of an hour:
#
#   bash benchmarks/gpu_quarter.sh FOLDER [PART...]
#
#   part      seconds
#   tests         150   pytest -m gpu of the kernels and of the training step: real shapes against float64, repeats
#                       bitwise, graph replay equal to eager, no sync; meanwhile the code of the steps is compiled
#   tuning        120   the dispatch table of the LoRA kernels for SD1.5 and SDXL at rank 16
#   kernels        90   LoRA linear, alignment and loss beside their peers
#   steps         240   whole steps of SD1.5, rank 16, 16 images of 64 x 64 latents: this package's, captured; peft's,
#                       with all else equal; diffusers' script. Repeated blocks are compiled first, then whole steps
#   sdxl          120   steps of SDXL, 4 images of 128 x 128 latents, uncompiled; steps under a cap of the memory
#   batch-1       600   steps of SD1.5 with one image
#
# Each part ends at its own limit, and all of them after D2F_SUITE_SECONDS (default: 780). The same command goes on with
# what FOLDER lacks: first the parts that did not reach their limit, in this order, and then those that did, as long as
# there is time; no row is measured twice. So it may be stopped at any moment, by a signal too, and started again.
# PART names parts to run alone.
#
# FOLDER gets results/*.csv, each row as soon as it is measured; a log of each command; lora_measured.json, the
# dispatch table of the LoRA kernels, which later parts use: to keep it, commit it as kernels/lora_measured.json; and
# cache/, compiled code, unless TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR name other folders. At the end all rows are
# printed, and charts of them written to results/*.svg.
#
# Exit codes: 0 complete, 1 a command failed (see its log), 2 wrong use, 124 stopped by a limit, 143 by a signal.
#
# Requirements: Linux, one NVIDIA GPU, Python 3.11 or 3.12, a C compiler (which Triton calls), torch 2.11 with triton 3.6
# or newer, and packages that a machine without a network cannot download: download them (58 MB for Python 3.12) on
# another machine under the same Python, and install them beside the torch that is there:
#
#   grep -vE '^(torch|triton)=' constraints.txt > rest.txt
#   pip download --no-deps --only-binary :all: -c rest.txt -d wheels accelerate annotated-doc annotated-types anyio \
#     certifi charset-normalizer click diffusers docstring_parser execnet h11 httpcore2 httpx2 huggingface_hub idna \
#     importlib_metadata iniconfig lazy-importer markdown-it-py mdurl numpy packaging peft pillow pluggy psutil \
#     py-cpuinfo2 pydantic pydantic_core pygments pytest pytest-benchmark pytest-xdist pyyaml regex requests rich \
#     safetensors shellingham tokenizers tqdm transformers truststore typeguard typer typing-inspection tyro urllib3 \
#     zipp
#   pip install --no-index --no-deps wheels/*.whl
#
# What the machine has in versions that pyproject.toml allows may be left out. Beside transformers 5.17, accelerate and
# pytest with its plugins, 8 MB remain: diffusers docstring_parser importlib_metadata lazy-importer peft typeguard tyro
# zipp. Without pytest-xdist the tests run one after the other.
#
# Kernels of the tuning may be compiled before, on a machine with the same Python and Triton and without a GPU, and taken
# along, which took 4 minutes on two busy CPU cores (Triton 3.6; 128 MB, packed 14):
#
#   TRITON_CACHE_DIR=cache python -m benchmarks.tune_lora --shapes steps --compile_for 90
#   tar czf cache.tar.gz cache
#
# GIT_COMMIT names the commit in the rows where git or the repository's history is missing. D2F_SUITE_DRY_RUN=1 runs
# every command at its smallest size, for which a CPU suffices; its rows name the device "dry run on …".
set -uo pipefail
folder=${1:+$(realpath -m "$1")} chosen=("${@:2}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

declare -A limits=([tests]=150 [tuning]=120 [kernels]=90 [steps]=240 [sdxl]=120 [batch-1]=600)
parts=(tests tuning kernels steps sdxl batch-1)
for part in ${chosen[@]+"${chosen[@]}"}; do
  [[ -n ${limits[$part]:-} ]] || folder=
done
if [[ -z $folder ]] || ! mkdir -p "$folder/results" "$folder/state" "$folder/cache"; then
  echo "usage: bash benchmarks/gpu_quarter.sh FOLDER [tests|tuning|kernels|steps|sdxl|batch-1]..." >&2
  exit 2
fi
((${#chosen[@]})) || chosen=("${parts[@]}")
total=${D2F_SUITE_SECONDS:-780}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$folder/cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$folder/cache/inductor}
dry=() timing=graph
if [[ ${D2F_SUITE_DRY_RUN:-} == 1 ]]; then
  dry=(--dry_run)
fi
if ! command -v nvidia-smi > /dev/null; then
  export TRITON_INTERPRET=1
  timing=launched
fi
failed=0

stop() {
  trap - TERM INT HUP
  local running
  running=$(jobs -p)
  # Each command runs under timeout, which passes the signal on to all processes of the command.
  [[ -z $running ]] || kill $running
  wait
  exit 143
}
trap stop TERM INT HUP

# start NAME COMMAND...: start a command for the rest of the part, in the background, with a log. It is process $!.
start() {
  echo "--- $1, at most $((end - SECONDS)) s: ${*:2}"
  timeout --kill-after=10 "$((end - SECONDS))" "${@:2}" >> "$folder/$1.log" 2>&1 &
}

# finish NAME PROCESS: wait for a command, print the end of its log, and note how it ended.
finish() {
  local code=0
  wait "$2" || code=$?
  tail -n 15 "$folder/$1.log"
  case $code in
    0) echo "--- $1: done, $SECONDS s after the start" ;;
    124 | 137) ended=cut && echo "--- $1: cut, $SECONDS s after the start" ;;
    *)
      failed=1
      [[ $ended == cut ]] || ended=failed
      echo "--- $1: failed ($code)"
      ;;
  esac
}

run() {
  if ((SECONDS >= end)); then
    ended=cut
    echo "--- $1: no time left"
    return
  fi
  start "$@"
  finish "$1" $!
}

bench() {
  run "$1" python -m pytest -q --benchmark --go_on --results "$folder/results" ${dry[@]+"${dry[@]}"} "${@:2}"
}

script() {
  run "$1" python -m "benchmarks.$2" --results "$folder/results" ${dry[@]+"${dry[@]}"} "${@:3}"
}

keep_table() {
  if [[ -e $folder/lora_measured.json && -z ${dry[*]-} ]]; then
    cp "$folder/lora_measured.json" kernels/
  fi
}

part_tests() {
  local parallel=() filling half=$(($(nproc) / 2))
  python -c 'import xdist' 2> /dev/null && parallel=(-n $((half < 6 ? half : 6)))
  start fill-cache env TORCHINDUCTOR_COMPILE_THREADS=4 python -m benchmarks.fill_cache ${dry[@]+"${dry[@]}"}
  filling=$!
  # Networks that are compiled as a whole, and steps with LPIPS in their loss, are left out: each takes a minute.
  run tests python -m pytest -q -m gpu -p benchmarks.kept_tests --results "$folder/results" ${dry[@]+"${dry[@]}"} \
    ${parallel[@]+"${parallel[@]}"} tests/kernels tests/layers/test_lora_on_a_gpu.py tests/training/test_step_graphs.py \
    -k 'not -full] and not lpips and not compiled_unet'
  finish fill-cache "$filling"
}

part_tuning() {
  script tuning tune_lora --shapes steps --minutes 9 --output "$folder/lora_measured.json"
  keep_table
}

part_kernels() {
  script products probe --only linear --minutes 9
  bench objective benchmarks/bench_align.py benchmarks/bench_velocity_loss.py -k "$timing and not 1x4x64x64"
  bench lora-linear benchmarks/bench_lora_linear.py -k "$timing and not input and not engine"
}

part_steps() { bench steps benchmarks/bench_train_step.py -k '[b16_first'; }

part_sdxl() {
  bench sdxl benchmarks/bench_train_step.py -k '[sdxl_first and eager or [sdxl_first and script'
  bench memory benchmarks/bench_train_step.py -k 'test_memory_cap'
  bench sdxl-compiled benchmarks/bench_train_step.py -k '[sdxl_first and blocks'
}

part_batch-1() { bench batch-1 benchmarks/bench_train_step.py -k '[b1_first'; }

# take PART: run a part until its limit or that of the whole run, and note whether it is done, cut or failed.
take() {
  end=$((SECONDS + limits[$1])) ended=done
  ((end <= total)) || end=$total
  if ((SECONDS >= end)); then
    echo "--- $1: no time left"
    return
  fi
  "part_$1"
  # A part that the whole run's limit has cut is the first to go on.
  [[ $ended == cut ]] && ((SECONDS >= total)) || echo "$ended" > "$folder/state/$1"
}

state_of() { cat "$folder/state/$1" 2> /dev/null || echo new; }

keep_table
again=()
for part in "${chosen[@]}"; do
  case $(state_of "$part") in
    new) take "$part" ;;
    failed) again+=("$part") ;;
  esac
  [[ $(state_of "$part") != cut ]] || again+=("$part")
done
for part in ${again[@]+"${again[@]}"}; do
  take "$part"
done
python -m benchmarks.report "$folder/results" 2>&1 | tee "$folder/summary.txt"
((failed)) && exit 1
for part in "${chosen[@]}"; do
  [[ $(state_of "$part") == done ]] || exit 124
done
exit 0
