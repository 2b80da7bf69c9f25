#!/usr/bin/env bash
# A teacher, a baseline and two distilled students on scikit-learn's digits, what the teacher did to them, one table, and
# the model card that the CKA student would have on the Hub.
# Needs no network.
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

student=outputs/quickstart/cka
echo "== evaluate_model.py $student"
"$python" scripts/evaluate_model.py $student --teacher_model outputs/quickstart/teacher \
    --baseline_model outputs/quickstart/baseline --device cpu
echo "== analyze.py $student"
"$python" scripts/analyze.py $student --teacher_model outputs/quickstart/teacher --metrics attention,cka --device cpu
echo "== analyze.py --compare baseline kd cka"
"$python" scripts/analyze.py --compare outputs/quickstart/{baseline,kd,cka} --teacher_model outputs/quickstart/teacher \
    --hessian_images 64 --max_probes 16 --lanczos_steps 16 --lanczos_starts 1 \
    --output_dir outputs/quickstart/comparison --device cpu

"$python" scripts/summarize.py outputs/quickstart/{teacher,baseline,kd,cka}
echo "== publish.py $student --dry_run"
"$python" scripts/publish.py $student --dry_run --hub_model_id your-name/deit-digits-cka
