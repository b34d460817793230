#!/bin/sh
# The runs behind results/paper, block by block. Type it again after any stop: it goes on where it was.
#   results/paper/runs.sh BLOCK RUNS_DIR    (BLOCK 1 to 4, in the repository's root, at commit 4fb1a03)
set -eu
status=0
grid() { # goes on after a run that failed, not after Ctrl-C
    nice -n 19 python run_grid.py --runs-dir "$runs" --workers 2 "$@" || status=$?
    [ "$status" -le 1 ] || exit "$status"
}
all="--no-track --checkpoint-interval 50000"
runs=$2
case $1 in
1) seeds="1 2 3" ;;
3) seeds="4 5" ;;
esac
case $1 in
1 | 3)
    for pair in HalfCheetah-v5:89 Ant-v5:71; do # hidden width at which a dense network has as many weights as 1:8 keeps
        grid --env-ids "${pair%:*}" --seeds $seeds --commands \
            "rnm_td3_continuous.py --n 1 --m 8 $all" "rnm_td3_continuous.py --n 1 --m 4 $all" \
            "rnm_td3_continuous.py --n 2 --m 4 $all" "dense_td3_continuous.py $all" \
            "dense_td3_continuous.py --hidden-dim ${pair#*:} $all"
    done
    ;;
2)
    grid --env-ids HalfCheetah-v5 --seeds 1 2 3 4 5 --commands \
        "rnm_td3_continuous.py --n 1 --m 8 --mask-update-interval 100 $all" \
        "rnm_td3_continuous.py --n 1 --m 8 --mask-update-interval 10_000 $all" \
        "rnm_td3_continuous.py --n 1 --m 8 --mask-update-interval 0 $all"
    grid --env-ids HalfCheetah-v5 --seeds 1 2 3 --commands "rnm_td3_continuous.py --n 1 --m 8 --sparse-head $all"
    ;;
4)
    grid --env-ids Ant-v5 --seeds 1 2 3 --commands \
        "rnm_td3_continuous.py --n 1 --m 8 --mask-update-interval 0 $all" \
        "rnm_td3_continuous.py --n 2 --m 4 --mask-update-interval 0 $all"
    ;;
esac
exit "$status"
