#!/usr/bin/env bash
# Run the tests and benchmarks that need a GPU, in stages of at most nine minutes:
#
#   bash benchmarks/gpu_suite.sh STAGE FOLDER
#
#   probe      for six minutes, time matrix products and attention kernels of torch and Triton alone
#   correct    run pytest -m gpu file by file, the kernels first (real shapes against float64, 100 repeats bitwise, graph
#              replay, no sync); run memcheck and racecheck where compute-sanitizer is installed
#   kernels    tune the LoRA kernels, then time all kernels beside their peers
#   step-b16   time whole training steps of SD1.5 and SD2.1 beside peft at batch 16 and 64: first the rivals, then each
#              lever alone and other ranks, networks and batches
#   step-b1    do the same at batch 1: the rivals, the first step cold and warm, the memory cap, the aspect-ratio
#              buckets, the rest
#   sdxl       time steps of SDXL at 128 x 128 latents: uncompiled; the memory cap; compiled, 250 to 400 s per row
#
# Half an hour is best spent in this order, with these values of D2F_SUITE_SECONDS: correct, 450, because times count
# only for right results; kernels, 240, most of it for the tuning, whose table the steps use; step-b16, 400; step-b1,
# 330; sdxl, 200, which is enough for the rows without compiling. Another half hour continues with the rows that each
# stage lacks. Begin with probe on a GPU that was never measured.
#
# FOLDER gets results/*.csv, each row as soon as it is measured; a log of each command; and lora_measured.json, the
# dispatch table of the LoRA kernels, which later stages use: to keep it, commit it as kernels/lora_measured.json. A
# stage that is stopped, by its own limit or from outside, keeps all this, and the same command continues: rows that
# FOLDER has are not measured again. At the end all rows are printed, and charts of them written to results/*.svg.
#
# Exit codes: 0 complete, 1 a command failed (see its log), 2 wrong use, 124 stopped by the limit.
#
# Requirements: Linux, one NVIDIA GPU, Python 3.11 or 3.12, a C compiler (which Triton calls), torch 2.11 with triton 3.6
# or newer. `probe` needs nothing else. The other stages need packages that a machine without a network cannot download:
# download them (60 MB) on another machine under the same Python, and install them beside the torch that is there:
#
#   grep -vE '^(torch|triton)=' constraints.txt > rest.txt
#   pip download --no-deps --only-binary :all: -c rest.txt -d wheels accelerate annotated-doc annotated-types anyio \
#     certifi charset-normalizer click diffusers docstring_parser execnet h11 hf-xet httpcore2 httpx2 huggingface_hub \
#     idna importlib_metadata iniconfig lazy-importer markdown-it-py mdurl numpy packaging peft pillow pluggy psutil \
#     py-cpuinfo2 pydantic pydantic_core pygments pytest pytest-benchmark pytest-xdist pyyaml regex requests rich \
#     safetensors shellingham tokenizers tqdm transformers truststore typeguard typer typing-inspection tyro urllib3 \
#     zipp
#   pip install --no-index --no-deps wheels/*.whl
#
# pytest-xdist is optional: with it `correct` runs its tests, most of whose time is compiling, in eight processes.
#
# GIT_COMMIT names the commit in the rows where git or the repository's history is missing.
# D2F_SUITE_SECONDS sets another limit, in seconds; D2F_SUITE_DRY_RUN=1 runs every command at its smallest size, for which
# a CPU suffices.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage=${1:-} folder=${2:-}
case $stage in
  probe) seconds=360 ;;
  correct | kernels | step-b16 | step-b1 | sdxl) seconds=540 ;;
  *) folder= ;;
esac
if [[ -z $folder ]] || ! mkdir -p "$folder/results"; then
  echo "usage: bash benchmarks/gpu_suite.sh probe|correct|kernels|step-b16|step-b1|sdxl FOLDER" >&2
  exit 2
fi
folder=$(cd "$folder" && pwd)
limit=${D2F_SUITE_SECONDS:-$((seconds - 40))} # the rest of the time is for the report
dry=()
if [[ ${D2F_SUITE_DRY_RUN:-} == 1 ]]; then
  dry=(--dry_run)
  command -v nvidia-smi > /dev/null || export TRITON_INTERPRET=1
fi
failed=0 cut=0 steps=benchmarks/bench_train_step.py

# run NAME SECONDS COMMAND...: run a command for at most SECONDS, and at most for the rest of the stage.
run() {
  local name=$1 most=$2 code
  shift 2
  ((most <= limit - SECONDS)) || most=$((limit - SECONDS))
  if ((most <= 0)); then
    echo "--- $name: no time left"
    cut=1
    return 1
  fi
  echo "--- $name, at most $most s: $*"
  timeout --kill-after=10 "$most" "$@" 2>&1 | tee -a "$folder/$stage-$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) echo "--- $name: done, $SECONDS s after the start" ;;
    124 | 137) cut=1 && echo "--- $name: cut" ;;
    *) failed=1 && echo "--- $name: failed ($code)" ;;
  esac
  return "$code"
}

# once NAME SECONDS COMMAND...: run a command like `run`, unless it succeeded before.
once() {
  [[ -e $folder/$1.done ]] || { run "$@" && touch "$folder/$1.done"; }
}

bench() {
  run "$1" 900 python -m pytest -q --benchmark --go_on --results "$folder/results" ${dry[@]+"${dry[@]}"} "${@:2}"
}

if [[ -e $folder/lora_measured.json && -z ${dry[*]-} ]]; then
  cp "$folder/lora_measured.json" kernels/
fi
case $stage in
  probe)
    run probe 900 python -m benchmarks.probe --minutes 60 --results "$folder/results" ${dry[@]+"${dry[@]}"}
    ;;
  correct)
    parallel=()
    python -c 'import xdist' 2> /dev/null && parallel=(-n 8)
    # The kernels' files come first, then the others. tests/export is left out, because it needs TensorRT.
    mapfile -t files < <(grep -rl --include='test_*.py' 'mark[.]gpu' tests/kernels tests/layers/test_lora_on_a_gpu.py tests |
      grep -v '^tests/export/' | awk '!seen[$0]++')
    for file in "${files[@]}"; do
      once "$(basename "$file" .py)" 240 python -m pytest -q -m gpu ${parallel[@]+"${parallel[@]}"} "$file"
    done
    once launches 200 python tests/kernels/small_launches.py # fills Triton's cache, because compiling under the sanitizer is slow
    if command -v compute-sanitizer > /dev/null; then
      for tool in memcheck racecheck; do
        once "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 1 python tests/kernels/small_launches.py
      done
    else
      echo "--- compute-sanitizer is not installed: no memcheck, no racecheck"
    fi
    ;;
  kernels)
    run tuning 240 python -m benchmarks.tune_lora --minutes 3 --output "$folder/lora_measured.json" \
      --results "$folder/results" ${dry[@]+"${dry[@]}"}
    if [[ -e $folder/lora_measured.json && -z ${dry[*]-} ]]; then
      cp "$folder/lora_measured.json" kernels/
    fi
    bench benchmarks benchmarks/bench_lora_linear.py benchmarks/bench_velocity_loss.py benchmarks/bench_align.py
    ;;
  step-b16)
    bench rivals "$steps" -k '[b16_first'
    bench rest "$steps" -k '[b16_rest'
    ;;
  step-b1)
    bench rivals "$steps" -k '[b1_first'
    bench first-step "$steps" -k test_first_step
    bench memory "$steps" -k 'test_memory_cap[b1]'
    bench buckets "$steps" -k test_buckets
    bench rest "$steps" -k '[b1_rest'
    ;;
  sdxl)
    bench uncompiled "$steps" -k '[sdxl_first'
    bench memory "$steps" -k 'test_memory_cap[sdxl]'
    bench rest "$steps" -k '[sdxl_rest'
    ;;
esac
python -m benchmarks.report "$folder/results" 2>&1 | tee "$folder/summary.txt"
((failed)) && exit 1
((cut)) && exit 124
exit 0
