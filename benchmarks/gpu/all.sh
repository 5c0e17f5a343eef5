#!/bin/bash
# Everything that needs a GPU, in one command; what it prints stays in OUT, and one failure stops nothing else.
#
#     bash benchmarks/gpu/all.sh [OUT]                 some six minutes on one data-centre GPU
#     JOBS=6 bash benchmarks/gpu/all.sh                tests side by side, with pytest-xdist
#
# Wants: this package built with nvcc on PATH and with its test extras, and an MPI. One that reaches device memory
# shows the direct route too. compute-sanitizer comes with CUDA.
set -u
out=${1:-gpu-out}
mkdir -p "$out"
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.." || exit 1
export PIPEDREAM_SHARE_GPUS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
python=${PYTHON:-python}
began=$(date +%s)
{ date; nvidia-smi -L; $python -c 'import torch; print("torch", torch.__version__)'; nvcc --version | tail -1
  mpirun --version | head -1; } > "$out/machine.txt" 2>&1

step() {  # name, time limit in seconds, command
  local name=$1 limit=$2
  shift 2
  timeout --kill-after 10 "$limit" "$@" > "$out/$name.txt" 2>&1
  local status=$? now
  now=$(($(date +%s) - began))
  if [ $status = 0 ]; then echo "passed   $name   after $now s"
  else echo "FAILED   $name   after $now s (status $status): see $out/$name.txt" | tee -a "$out/failed.txt"; fi
}
rm -f "$out/failed.txt"

# With all processes that are started. MPI asks about every address whether the device knows it; that the answer is
# no is no error.
sanitizer="compute-sanitizer --target-processes all --report-api-errors no --error-exitcode 9 --tool"

# What is right or wrong, side by side.
step tests 400 $python -m pytest -q -rs ${JOBS:+-n $JOBS} benchmarks/gpu &
step demo 240 $python examples/demo.py --out "$out/demo" &
step memcheck 300 $sanitizer memcheck $python -m pytest -q -x benchmarks/gpu -k pool &
step racecheck 300 $sanitizer racecheck $python -m pytest -q -x benchmarks/gpu -k pool &
step memcheck-staged 300 $sanitizer memcheck mpirun -n 2 $python benchmarks/gpu/exchange.py staged &
step memcheck-direct 300 $sanitizer memcheck mpirun -n 2 $python benchmarks/gpu/exchange.py direct &
step racecheck-staged 300 $sanitizer racecheck mpirun -n 1 $python benchmarks/gpu/exchange.py staged &
step racecheck-direct 300 $sanitizer racecheck mpirun -n 1 $python benchmarks/gpu/exchange.py direct &
wait
# What is measured, one after the other.
step pool 240 $python benchmarks/gpu/pool.py --json "$out/pool.json"
step channel 240 $python benchmarks/gpu/channel.py --json "$out/channel.json"
step gpt 400 $python benchmarks/gpu/gpt.py --out "$out/gpt"
step memory 300 $python benchmarks/memory.py --device cuda --out "$out/memory"
[ ! -e "$out/failed.txt" ]
