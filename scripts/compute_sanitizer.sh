#!/bin/sh
# The CUDA kernels under compute-sanitizer of a CUDA toolkit: accesses, races in shared memory, barriers.
#
#     scripts/compute_sanitizer.sh            # needs a GPU, torch with CUDA and compute-sanitizer; some ten minutes
#
# Runs the comparisons of benchmarks/cuda_check.py at odd sizes, without the measurements. Ends at the first tool that
# finds something.
set -eu
cd "$(dirname "$0")/.."
for tool in memcheck racecheck synccheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        "${PYTHON:-python}" benchmarks/cuda_check.py --only quick,correct --seconds 0
done
echo "compute-sanitizer found nothing"
