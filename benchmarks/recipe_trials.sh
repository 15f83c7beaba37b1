#!/bin/sh
# Other estimators: recipes_trials.csv, on the instructions that are hardest outside the examples' range, three models.
set -e
cd "$(dirname "$0")/.."
for model in thought_kernels/demo/checkpoint benchmarks/models/small benchmarks/models/longer; do
    python benchmarks/recipes.py --model "$model" --seeds 0 1 \
        --tasks sort,largest,sort_down,reverse,add_one,double,parity \
        --output benchmarks/results/recipes_trials.csv --recipes default affine \
        "affine in block 0's attention only" words "words, own answers" \
        "one matrix per head" "one matrix per group of heads" "other heads at ten times the ridge" \
        "ridge in the metric of other texts" "ridge in the covariance of other texts" "ridge in the rows' covariance" \
        "towards the mean shift" "towards the mean shift, along the mean" "weighted by KL" "weighted by shift"
done
