#!/usr/bin/env bash
# Create a virtual environment, install this package and its development tools in it, and describe what was installed.
#
#   bash environment.sh FOLDER
#
# It writes the description to FOLDER/installed.txt, as its last act. Three variables change what it does:
#
#   PYTHON        The interpreter to use. Unset: the first Python 3.11 or 3.12 among python3, python3.12, python3.11, python.
#   TORCH_INDEX   The package index to take torch from, such as https://download.pytorch.org/whl/cpu. Unset: that index
#                 of CPU builds where there is no NVIDIA GPU, and pip's own settings where it has no build or there is
#                 a GPU. Empty: pip's own settings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

folder=$1
cpu_builds=https://download.pytorch.org/whl/cpu
required="Python 3.11 or 3.12 with its venv module"

fail() {
  echo "environment.sh: $1" >&2
  exit 1
}

fits() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1
}

version_of() {
  "$1" --version 2>&1 | head -n 1 || true
}

find_python() {
  local name
  if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" || fail "PYTHON=$PYTHON is not $required: $(version_of "$PYTHON")"
    echo "$PYTHON"
    return
  fi
  for name in python3 python3.12 python3.11 python; do
    if fits "$name"; then
      echo "$name"
      return
    fi
  done
  fail "found no $required (python3 is: $(version_of python3)). Install it, or name one: make test PYTHON=/path/to/python3.12"
}

has_nvidia_gpu() {
  [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1
}

python="$folder/bin/python"
if [ ! -e "$python" ] || ! "$python" -m pip --version >/dev/null 2>&1; then
  base=$(find_python)
  "$base" -m venv "$folder"
fi
fits "$python" || fail "$folder holds $(version_of "$python"), which is not $required. Remove the folder, or name another: make test VENV=other"

# torch comes first and alone, so that no other package is taken from its index.
torch=$(grep '^torch==' constraints.txt)
if [ -n "${TORCH_INDEX:-}" ]; then
  "$python" -m pip install --no-compile --no-deps --index-url "$TORCH_INDEX" "$torch" ||
    fail "TORCH_INDEX=$TORCH_INDEX has no $torch. Name another index, or leave TORCH_INDEX empty for the build that pip finds by itself"
elif [ -z "${TORCH_INDEX+set}" ] && ! has_nvidia_gpu; then
  echo "There is no NVIDIA GPU here: looking for the CPU build of $torch (TORCH_INDEX= takes the build that pip finds by itself)."
  "$python" -m pip install --no-compile --no-deps --index-url "$cpu_builds" --retries 2 --timeout 15 "$torch" 2>/dev/null ||
    echo "pip found no $torch at $cpu_builds: taking the build that pip finds by itself."
fi
# Type checkers follow an editable installation in this mode alone.
"$python" -m pip install --no-compile -c constraints.txt -e ".[dev]" --config-settings editable_mode=compat

"$python" - "$folder" "$(du -sh "$folder" | cut -f 1)" >"$folder/installing.txt" <<'END'
import platform
import sys

import torch

folder, size = sys.argv[1:]
build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
print(f"{folder}: Python {platform.python_version()}, torch {torch.__version__} ({build} build), {size} on disk")
END
mv "$folder/installing.txt" "$folder/installed.txt"
