#!/usr/bin/env bash
# A DeepSpeed hostfile of the current Slurm allocation, on standard output.
#
#     launch/slurm/hostfile.sh [RANKS_PER_NODE] > hosts
#
# Ranks per node: the argument, or RANKS_PER_NODE, or the allocation's GPUs on a node, or 1.
set -euo pipefail
if [ -z "${SLURM_JOB_NODELIST:-}" ]; then
    echo "hostfile.sh: SLURM_JOB_NODELIST is not set; run it in an allocation (salloc, sbatch)" >&2
    exit 64
fi
slots=${1:-${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}}
# Assigned first: a failure of scontrol ends the script instead of giving an empty file.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
for node in $nodes; do
    echo "$node slots=$slots"
done
