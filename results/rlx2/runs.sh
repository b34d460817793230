#!/bin/sh
# The runs behind results/rlx2. Type it again after any stop: it goes on where it was.
#   results/rlx2/runs.sh RUNS_DIR    (in the repository's root, at the tag rlx2-runs)
set -eu
status=0
all="--no-track --checkpoint-interval 50000 --total-timesteps 1_000_000"
plain="--nstep 1 --no-dynamic-buffer"
for place in HalfCheetah-v4:0.90:0.85:87 Hopper-v4:0.98:0.95:46; do # sparsities of the paper's Table 2; equal width
    IFS=: read -r env actor critic width <<EOF
$place
EOF
    rlx2="rlx2_td3_continuous.py --actor-sparsity $actor --critic-sparsity $critic $all"
    nice -n 19 python run_grid.py --runs-dir "$1" --workers 2 --env-ids "$env" --seeds 1 2 3 --commands \
        "$rlx2" "$rlx2 $plain" "$rlx2 $plain --topology set" "$rlx2 $plain --topology static" \
        "dense_td3_continuous.py --hidden-dim $width $all" "dense_td3_continuous.py $all" || status=$?
    [ "$status" -le 1 ] || exit "$status" # go on after a run that failed, not after Ctrl-C
done
exit "$status"
