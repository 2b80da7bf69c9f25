#!/usr/bin/env bash
# A teacher, a baseline and two distilled students on scikit-learn's digits, then one table. Needs no network.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

run() { # SCRIPT RECIPE
    echo "== $1 $2"
    "$python" "scripts/$1" "recipes/quickstart/$2.json" --use_cpu true --overwrite_output_dir true
}
run train.py teacher
run train.py baseline
run distill.py kd
run distill.py cka
"$python" scripts/summarize.py outputs/quickstart/{teacher,baseline,kd,cka}
