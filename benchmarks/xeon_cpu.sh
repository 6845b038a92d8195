#!/usr/bin/env bash
# Builds the C++ engine with g++ alone, runs its tests on every instruction set of this machine (AMX included) and measures
# decode and prefill at the shape of Mamba-2 1.3B. No network, no Python, some 90 seconds on 32 cores.
#
#     bash benchmarks/xeon_cpu.sh OUT.json          # BUILD=directory for objects (default: a temporary one)
#     THREADS=1,2,4 STATES=bf16 bash benchmarks/xeon_cpu.sh OUT.json
#     PROFILE=1 bash benchmarks/xeon_cpu.sh OUT.json     # the time in each kernel to stderr
#
# Threads are kept on one core each of the first NUMA node. The table goes to stderr, the figures to OUT.json.
set -euo pipefail
out=${1:?"usage: bash benchmarks/xeon_cpu.sh OUT.json"}
root=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD:-$(mktemp -d)}
JOBS=${JOBS:-$(nproc)}
export JOBS

mkdir -p "$build"
bash "$root/scripts/build_cpp.sh" "$build/cpu_engine" "$root/benchmarks/cpu_engine.cpp" &
bash "$root/scripts/build_cpp.sh" "$build/engine_test" "$root/tests/cpp/engine_test.cpp"
wait $!

tests=0
tests_said=$(timeout 100 "$build/engine_test" 2>&1) || tests=$?
printf '%s\n' "$tests_said" >&2

# One logical processor of every core on the first NUMA node, of those that this process may use
allowed=$(taskset -pc $$ | sed 's/.*: //')
cores=$(lscpu -p=CPU,CORE,NODE | grep -v '^#' | awk -F, -v allowed="$allowed" '
  BEGIN {
    n = split(allowed, part, ",")
    for (i = 1; i <= n; ++i) { split(part[i], r, "-"); for (c = r[1]; c <= (r[2] == "" ? r[1] : r[2]); ++c) may[c] = 1 }
  }
  ($1 in may) && node == "" { node = $3 }
  ($1 in may) && $3 == node && !($2 in seen) { seen[$2] = 1; printf "%s%s", comma, $1; comma = "," }')
count=$(tr ',' '\n' <<<"$cores" | wc -l)
if [ -z "${THREADS:-}" ]; then
  THREADS=""
  for n in 4 16 1; do ((n <= count)) && THREADS+="${THREADS:+,}$n"; done
fi
load=$(cut -d' ' -f1-3 /proc/loadavg)
echo "cores $cores, threads $THREADS, load average $load" >&2
rows=$(BUDGET=${BUDGET:-60} timeout 120 taskset -c "$cores" "$build/cpu_engine" "$THREADS" "${STATES:-int8,bf16}")
cat >"$out" <<JSON
{"command": "bash benchmarks/xeon_cpu.sh", "date": "$(date -u +%FT%TZ)",
 "cpu": "$(lscpu | sed -n 's/^Model name: *//p' | head -1)", "cores": "$cores", "load_average": "$load",
 "compiler": "$(g++ --version | head -1)", "tests_exit_code": $tests,
 "tests": $(printf '%s' "$tests_said" | awk 'BEGIN { printf "[" } { gsub(/"/, ""); printf "%s\"%s\"", sep, $0; sep = ", " } END { printf "]" }'),
 "engine": $rows}
JSON
echo "wrote $out" >&2
exit "$tests"
