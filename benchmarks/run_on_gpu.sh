#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in one go and within a given time: builds the package, proves that it is right, measures.
#
#   benchmarks/run_on_gpu.sh [--seconds N] [--out FOLDER] [--wheels FOLDER] [--rehearse] [STAGE ...]
#
# Stages run in the order of their value (`--list` shows them, default: all), each within a limit of its own, and none is
# begun that no longer fits into N seconds (default: 560). A stage or case that fails keeps nothing else from running.
# After each stage FOLDER (default: build/gpu) has two files: summary.txt, which is printed at the end too, and
# run.tar.gz with logs and rows. What is done already, of the same sources, is left out when the script is started again
# with the same FOLDER.
# WHEELS (default: .whl, if there) are installed beside the environment. --rehearse runs everything on the CPU, on tiny
# shapes. PYTHON chooses the interpreter, COMMIT names the commit where git does not know it.
set -euo pipefail
cd "$(dirname "$0")/.."
# What is installed first counts as well.
export BEGAN=$(date +%s)
python=${PYTHON:-python3} wheels=.whl out=build/gpu arguments=()
while (($#)); do
    case $1 in
        --out) out=${2:?--out needs a folder} && shift ;;
        --wheels) wheels=${2:?--wheels needs a folder} && shift ;;
        --help) sed -n '2,13s/^# \{0,1\}//p' "$0" && exit ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
mkdir -p "$out" build/gpu_work
# What is built of other sources, or for another Python, is not what is to be measured.
export SOURCES=$({ "$python" -VV && find asyncdiff_fast kernels csrc CMakeLists.txt pyproject.toml setup.py -type f \
    ! -name '*.pyc' ! -name '*.so' -print0 | sort -z | xargs -0 sha256sum; } | sha256sum | cut -c1-12)
out=$(realpath "$out") site=$(realpath build/gpu_work)/site-$SOURCES
find build/gpu_work -maxdepth 1 -name 'site*' ! -path "*/site-$SOURCES" -exec rm -rf {} +
# Nothing of the environment is replaced; what is installed here comes before it.
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PYTHONWARNINGS=ignore
export HF_HUB_OFFLINE=1 COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}
# -P: the checkout must not come first on sys.path, since kernels/ is a package of asyncdiff_fast only once built.
exec "$python" -P benchmarks/gpu_stages.py --out "$out" --site "$site" "${arguments[@]}"
