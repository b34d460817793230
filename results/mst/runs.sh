#!/bin/sh
# The runs behind results/mst. Type it again after any stop: it goes on where it was.
#   results/mst/runs.sh RUNS_DIR    (in the root of a clone at the commit of the runs)
set -eu
mst="mst_td3_continuous.py --critic-hidden-dim 128 --actor-hidden-dim 64 --total-timesteps 300_000 --no-track"
mst="$mst --learning-rate 3e-4 --diagnostics-interval 10_000 --checkpoint-interval 50000"
for env in Hopper-v5 HalfCheetah-v5; do  # each counts when its 15 runs have ended; 1: some failed, for good
    nice -n 19 python run_grid.py --runs-dir "$1" --workers 2 --env-ids $env --seeds 1 2 3 --commands \
        "$mst --actor-regime dense --critic-regime dense" "$mst --critic-regime static" "$mst" \
        "$mst --actor-regime rigl --critic-regime static" "$mst --actor-nm 2:4 --critic-nm 2:4" || [ $? -eq 1 ]
done
