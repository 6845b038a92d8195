#!/bin/sh
# The CUDA kernels under compute-sanitizer of a CUDA toolkit: accesses, races in shared memory, barriers.
#
#     scripts/compute_sanitizer.sh            # needs a GPU, torch with CUDA and compute-sanitizer; some minutes
#     TOOLS=racecheck scripts/compute_sanitizer.sh --only quick --part mixer,broad-int8
#
# Runs the comparisons of benchmarks/cuda_check.py at odd sizes, without the measurements; parts of "quick" are a kernel
# family each. Looks at our kernels alone, not at torch's. Ends at the first tool that finds something.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- --only quick,correct --seconds 0
for tool in ${TOOLS:-memcheck racecheck synccheck}; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all --kernel-name kernel_substring=slimba \
        "${PYTHON:-python}" benchmarks/cuda_check.py "$@"
done
echo "compute-sanitizer found nothing"
