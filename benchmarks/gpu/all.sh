#!/usr/bin/env bash
# What a GPU does with this project, in 12 minutes: bash benchmarks/gpu/all.sh (--help lists the flags; README.md
# beside this file says what to bring and what the figures mean). Another Python: PYTHON=/path/to/python3.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-}
[ -n "$python" ] || { python=$here/../../.venv/bin/python; [ -x "$python" ] || python=python3; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
install() {
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check --upgrade \
        --target "$work/site" "$@"
}
if compgen -G "$here/wheels/*.whl" > /dev/null; then # from wheels.sh, for a machine without a network
    install "$here"/wheels/*.whl || for wheel in "$here"/wheels/*.whl; do
        install "$wheel" || echo "note: $wheel is left out"
    done
    export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=disabled
export TMPDIR="$work" TRITON_CACHE_DIR="$work/triton" MPLCONFIGDIR="$work" # a home that cannot be written is no matter
status=0
"$python" "$here/run.py" "$@" || status=$?
exit "$status"
