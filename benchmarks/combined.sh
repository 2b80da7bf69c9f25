#!/usr/bin/env bash
# Methods in one run on real images, 200 steps of the micro student:
#
#     bash benchmarks/combined.sh DATASET [OUTPUT_FOLDER]
#
# A ResNet-18 of a quarter of the width is trained for 200 steps and teaches by its scores and its features at once, live
# and, where both are of the stored image, from one row of the cache. Prints the table of the runs.
set -euo pipefail
cd "$(dirname "$0")/.."
dataset=$1
out=${2:-outputs/combined}
python=${PYTHON:-.venv/bin/python}
common=(--dataset_name "$dataset" --max_steps 200 --logging_steps 50 --seed 0 --use_cpu true --save_strategy no
    --eval_strategy no --load_best_model_at_end false --report_to none --max_eval_samples 1000 --max_train_samples 12800
    --disable_tqdm true --overwrite_output_dir true --analyses_after_training none)
[ -f "$out/teacher/evaluation.json" ] || "$python" scripts/train.py recipes/micro/resnet18.json "${common[@]}" --output_dir "$out/teacher"

distil() {
    name=$1
    shift
    "$python" scripts/distill.py recipes/micro/kd_resnet18.json "${common[@]}" --teacher_model "$out/teacher" \
        --student_layers 2 5 --teacher_layers 2 3 --teacher_cache_dir "$out/caches" --output_dir "$out/$name" "$@"
}

distil kd_cka --cka_weight 1.0 --teacher_cache off
distil kd_gram_token --gram_weight 1.0 --token_weight 1.0 --teacher_cache off
distil dkd_rsd --alpha 0 --method structural --dkd_weight 0.5 --rsd_weight 1.0 --teacher_cache off
clean=(--mixup_alpha 0 --cutmix_alpha 0 --teacher_logits_view clean)
distil kd_gram_live "${clean[@]}" --gram_weight 1.0 --teacher_cache off
distil kd_gram_cached "${clean[@]}" --gram_weight 1.0 --teacher_cache gram
"$python" scripts/summarize.py "$out"/{kd_cka,kd_gram_token,dkd_rsd,kd_gram_live,kd_gram_cached}
"$python" - "$out" <<'PY'
"""How far the losses from one row of the cache are from those of the live teacher."""
import json
import sys

live, cached = (
    [entry for entry in json.load(open(f"{sys.argv[1]}/kd_gram_{how}/training_history.json")) if "kd_loss" in entry]
    for how in ("live", "cached")
)
for name in ("loss", "kd_loss", "gram_loss"):
    worst = max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(live, cached, strict=True))
    print(f"{name}: at most {worst:.1e} of its value apart, {len(live)} logs of 50 steps")
PY
