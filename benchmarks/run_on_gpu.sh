#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in one go: builds the package, then tests, then benchmarks whose rows go to
# benchmarks/results/. Correctness comes first; a part that fails or takes too long does not keep the rest from running.
#
#   benchmarks/run_on_gpu.sh [--quick] [--out FOLDER] [PART ...]
#
# PART is one of build, tests, pipelines, single, patches, exchange, kernels, report (default: all). Each part's log
# lands in FOLDER (default build/gpu), with a copy of the rows and a summary, which is also the last thing printed. Without
# a GPU tests are skipped by themselves and benchmarks run as far as a CPU goes. PYTHON chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

out=build/gpu quick="" parts=()
while (($#)); do
    case $1 in
        --quick) quick=--quick ;;
        --out) out=${2:?--out needs a folder} && shift ;;
        build | tests | pipelines | single | patches | exchange | kernels | report) parts+=("$1") ;;
        *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
    esac
    shift
done
((${#parts[@]})) || parts=(build tests pipelines single patches exchange kernels report)
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(realpath "$out")
summary=$out/summary.txt
: >"$summary"
# The package beside the checkout, so that nothing of the environment is replaced.
export PYTHONPATH=$out/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)

# part NAME SECONDS COMMAND...: run it with a limit and its own log; note how it ended.
part() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    echo "== $name: $*"
    timeout --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    tail -n 3 "$out/$name.log"
    case $status in
        0) result=ok ;;
        124 | 137) result="took longer than $limit s" ;;
        *) result="FAILED with exit code $status" ;;
    esac
    printf '%-22s %-28s %5d s\n' "$name" "$result" $((SECONDS - start)) | tee -a "$summary"
    return $status
}

# -P: the checkout must not come first on sys.path, since kernels/ is a package of asyncdiff_fast only once built.
tests() { local name=$1 limit=$2 && shift 2 && part "$name" "$limit" "$python" -P -m pytest -q "$@"; }

build() {
    rm -rf "$out/site"
    part build 300 "$python" -m pip install --quiet --no-deps --no-build-isolation --target "$out/site" . && return
    # No pip or no setuptools that knows pyproject.toml: the Python part needs no building.
    mkdir -p "$out/site" && cp -r asyncdiff_fast "$out/site/" && cp -r kernels "$out/site/asyncdiff_fast/kernels"
    part build_copy 60 "$python" -P -c "import asyncdiff_fast.kernels"
}

for name in "${parts[@]}"; do
    case $name in
        build)
            build
            part doctor 120 "$python" -P -m asyncdiff_fast.commands.cli doctor
            ;;
        tests)
            tests tests_kernels 900 tests/kernels/test_gpu_kernels.py
            tests tests_exchange 300 tests/exchange/test_gpu_exchange.py
            ;;
        pipelines) tests tests_pipelines 900 tests/test_gpu_pipelines.py ;;
        single)
            if [[ $gpu ]]; then
                for model in sdxl sd15 flux; do
                    part "single_$model" 600 "$python" benchmarks/single_device.py --model $model --save $quick
                done
            else
                part single_tiny 300 "$python" benchmarks/single_device.py --device cpu --tiny
            fi
            ;;
        patches)
            # The compute side of patches: one process in the place of one rank, its kernels on and off.
            if [[ $gpu ]]; then
                sizes=${quick:+1024} && sizes=${sizes:-1024 2048 3840}
                for kernels in auto torch; do
                    part "patches_$kernels" 1200 "$python" benchmarks/patch_compute.py --model sdxl --pixels $sizes \
                        --patches 1 2 4 8 --options "kernels=$kernels" --save
                done
            fi
            ;;
        # Host times with the real driver; without a GPU it says that there is none.
        exchange) part exchange 300 "$python" benchmarks/bench_exchange.py --only gpu --save $quick ;;
        kernels)
            # With --quick 8 minutes together; without, hours. Either goes on where it was broken off.
            for stem in bench_group_norm bench_attention bench_pointwise; do
                if [[ $gpu ]]; then
                    part "$stem" 14400 "$python" "benchmarks/$stem.py" $quick
                else
                    part "${stem}_tiny" 120 "$python" "benchmarks/$stem.py" --device cpu --quick --out "$out/$stem.jsonl"
                fi
            done
            ;;
        report) part report 120 "$python" benchmarks/report.py ;;
    esac
done

cp -r benchmarks/results "$out/"
echo "== ${gpu:-no GPU}; logs and rows in $out"
cat "$summary"
! grep -qv ' ok  ' "$summary"
