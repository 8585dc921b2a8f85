#!/usr/bin/env bash
# Trains a run file with its method and densely, with several seeds, and prints the means.
#   jobs/seeds.sh jobs/fashion-mnist-vit.yaml 3 [section.key=value …]
# A run that is finished is not repeated; one that was interrupted continues.
set -euo pipefail
run_file=$1 seeds=$2; shift 2
name=$(basename "$run_file" .yaml) runs=${HPCLR_RUNS:-runs} all=()
for ((seed = 0; seed < seeds; seed++)); do
    hpclr train "$run_file" "name=$name-$seed" "train.seed=$seed" "$@"
    hpclr train "$run_file" "name=$name-dense-$seed" method.name=dense "train.seed=$seed" "$@"
    all+=("$runs/$name-$seed" "$runs/$name-dense-$seed")
done
hpclr summary --mean "${all[@]}"
