#!/usr/bin/env bash
# Builds a C++ program on the engine's sources with nothing but a compiler: no CMake, no Python, no network.
#
#     bash scripts/build_cpp.sh PROGRAM MAIN.cpp [compiler flags]     # CXX chooses the compiler
#     SIMDE=1 bash scripts/build_cpp.sh ...      # AVX-512 and AMX in plain C++ (Debian's libsimde-dev), for any AVX2 machine
#
# PROGRAM is written as given, objects go to PROGRAM.build. For sanitizers and emulators, and for benchmarks/xeon_cpu.sh.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
program=$1 main=$2
shift 2
cxx=${CXX:-g++}
cpu=$root/src/slimba/kernels/cpu
build=$program.build
mkdir -p "$build"
flags=(-std=c++17 -O3 -Wall -Wextra -ffp-contract=off -pthread "-I$cpu" "-I$root/tests/cpp" "$@")
avx2=(-mavx2 -mfma -mf16c)
avx512=("${avx2[@]}" -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512 -Wno-uninitialized -Wno-maybe-uninitialized)
if [ -n "${SIMDE:-}" ]; then
  flags+=(-DSLIMBA_SIMDE -DSLIMBA_EMULATE_AMX)
  avx512=("-I$root/tests/cpp/simde" -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized)
fi

sources=(dispatch engine/threads engine/model engine/matmul engine/forward engine/sequence engine/sampler engine/generate)
for family in sign int8 int4 floats norm ssm quant; do sources+=("$family/naive"); done
arch=$($cxx -dumpmachine)
case $arch in
  x86_64*)
    flags+=(-DSLIMBA_X86)
    for family in sign int8 int4 floats norm ssm; do sources+=("$family/avx2" "$family/avx512"); done
    sources+=(quant/avx2 quant/avxvnni quant/avx512vnni quant/avx512lookup quant/amx)
    ;;
  aarch64*)
    flags+=(-DSLIMBA_NEON)
    sources+=(quant/neon)
    ;;
esac

compile() {  # source without .cpp -> object
  local extra=()
  case $1 in
    */avx2) extra=("${avx2[@]}") ;;
    */avxvnni) extra=("${avx2[@]}" -mavxvnni) ;;
    */avx512) extra=("${avx512[@]}") ;;
    */avx512vnni | */avx512lookup | */amx) extra=("${avx512[@]}"); [ -n "${SIMDE:-}" ] || extra+=(-mavx512vnni) ;;
    */neon) extra=(-march=armv8.2-a+dotprod) ;;
  esac
  $cxx "${flags[@]}" "${extra[@]}" -c "$cpu/$1.cpp" -o "$build/${1//\//_}.o"
}

jobs=${JOBS:-$(nproc)}
for source in "${sources[@]}"; do
  while (($(jobs -rp | wc -l) >= jobs)); do wait -n; done
  compile "$source" &
done
$cxx "${flags[@]}" -c "$main" -o "$build/main.o" &
wait
objects=("$build/main.o")
for source in "${sources[@]}"; do objects+=("$build/${source//\//_}.o"); done
$cxx "${flags[@]}" "${objects[@]}" -o "$program"
