#!/usr/bin/env bash
# The worked example under model_cards/: a micro student, its control and its teacher on CIFAR-10, and the student's card.
#
#   bash benchmarks/model_card.sh DATASET [SEED]      # a Hub id or a folder; about 15 minutes on one core
set -euo pipefail
cd "$(dirname "$0")/.."
dataset=${1:?"expected a data set, such as uoft-cs/cifar10"} seed=${2:-0} python=${PYTHON:-python}
runs=outputs/micro/seed-$seed

run() { # SCRIPT NAME [MORE]
    script=$1 name=$2; shift 2
    [ -f "$runs/$name/evaluation.json" ] || "$python" "scripts/$script" "recipes/micro/$name.json" --seed "$seed" \
        --dataset_name "$dataset" --output_dir "$runs/$name" --overwrite_output_dir true "$@"
}
run train.py resnet18
run train.py ce_only
run distill.py cka --teacher_model "$runs/resnet18"
"$python" scripts/evaluate_model.py "$runs/cka" --teacher_model "$runs/resnet18" --baseline_model "$runs/ce_only"
"$python" scripts/analyze.py "$runs/cka" --teacher_model "$runs/resnet18" --metrics attention,cka --max_images 10000
"$python" scripts/publish.py "$runs/cka" --dry_run --hub_model_id your-name/deit-micro-cifar10-cka
mkdir -p model_cards/deit-micro-cifar10-cka/plots
cp "$runs"/cka/hub/{README.md,*.json} model_cards/deit-micro-cifar10-cka/
cp "$runs"/cka/hub/plots/*.png model_cards/deit-micro-cifar10-cka/plots/
rm -f model_cards/deit-micro-cifar10-cka/{config,preprocessor_config}.json
