#!/bin/sh
# Which place needs affine's vector: the rows of "Where affine's vector is needed" in docs/recipes.md, on three models.
set -e
cd "$(dirname "$0")/.."
for model in thought_kernels/demo/checkpoint benchmarks/models/small benchmarks/models/longer; do
    python benchmarks/recipes.py --model "$model" --seeds 0 --tasks sort,largest,add_one,double,parity \
        --output benchmarks/results/recipes_trials.csv --recipes default affine \
        "affine in block 0's attention only" "centred in block 0's attention" "ridge 0.1 in block 0's attention" \
        "ridge 1.0 in block 0's attention" "no attention patch in block 0"
    python benchmarks/recipes.py --model "$model" --seeds 0 --output benchmarks/results/recipes_trials.csv \
        --recipes default "centred in block 0's attention" "ridge 0.1 in block 0's attention"
done
