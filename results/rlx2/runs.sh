#!/bin/sh
# The runs behind results/rlx2. Type it again after any stop: it goes on where it was.
#   results/rlx2/runs.sh RUNS_DIR    (in the repository's root; one commit for all)
# The dense runs on HalfCheetah-v5 are those of results/paper.
set -eu
status=0
runs=$1
grid() { # goes on after a run that failed, not after Ctrl-C
    nice -n 19 python run_grid.py --runs-dir "$runs" --workers 2 --seeds 1 2 3 "$@" || status=$?
    [ "$status" -le 1 ] || exit "$status"
}
all="--no-track --checkpoint-interval 50000 --total-timesteps 1_000_000"
plain="--nstep 1 --no-dynamic-buffer"
for place in HalfCheetah-v5:0.90:0.85 Hopper-v4:0.98:0.95; do # sparsities of the paper's Table 2
    IFS=: read -r env actor critic <<EOF
$place
EOF
    rlx2="rlx2_td3_continuous.py --actor-sparsity $actor --critic-sparsity $critic $all"
    grid --env-ids "$env" --commands \
        "$rlx2" "$rlx2 $plain" "$rlx2 $plain --topology set" "$rlx2 $plain --topology static"
done
grid --env-ids Hopper-v4 --commands "dense_td3_continuous.py --hidden-dim 46 $all" "dense_td3_continuous.py $all"
exit "$status"
