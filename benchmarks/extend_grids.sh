#!/bin/sh
# Goes on where a grid of docs/convergence.md chose an edge: one rate more, twice, for each of these methods while the best
# one is the last that was tried; then the best ones with 8 and 2 replicas and three seeds. What has ended is kept in the
# record, so that this may be stopped and started again. Takes no network.
#
#     sh benchmarks/extend_grids.sh TRAIN VALIDATION [GPUS] [SECONDS] [more flags, such as --plan]
#
# TRAIN and VALIDATION are the texts of the record, english_train.txt.xz and english_val.txt.xz. --plan prints what is left
# and about how long it takes: 22 GPU-seconds a replica of a run, as runs of 4,883 steps take four times those of 1,221.
set -eu
train=$1 validation=$2 gpus=${3:-1} seconds=${4:-3600}
[ $# -gt 4 ] && shift 4 || shift $#
run() {
    stage=$1
    shift
    python -m benchmarks.convergence "$stage" --train "$train" --validation "$validation" --replicas 4 8 2 --compile \
        --stacked --jobs 8 --gpus "$gpus" --limit_s "$seconds" \
        --extended "data parallel" DiLoCo "Streaming int4" NoLoCo MT-DAO "$@"
}
run extend --most 2 "$@"
run rest --only "data parallel" DiLoCo "Streaming int4" NoLoCo MT-DAO --among 4 8 "$@"
