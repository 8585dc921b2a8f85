#!/usr/bin/env bash
# Trains a small vision transformer on real data with OIALR, then densely, and compares the two.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e datasets/digits.h5 ] || { mkdir -p datasets; hpclr data prepare digits datasets/digits.h5 --valid-fraction 0.1; }
hpclr train jobs/quickstart.yaml
hpclr train jobs/quickstart.yaml name=digits-vit-dense method.name=dense
hpclr summary runs/digits-vit runs/digits-vit-dense
