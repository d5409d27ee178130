#!/usr/bin/env bash
# One node's part of a job (srun starts one a node): DeepSpeed's launcher, which starts the ranks.
# Called by pretrain.sbatch with HOSTFILE, LOGS, MASTER_ADDR and MASTER_PORT in the environment;
# arguments are the run's flags.
set -uo pipefail

# The warning ahead of the time limit goes to every process of the step. The ranks take note of it
# and save; launchers would die of it. An ignored signal stays ignored in children, unless they
# take it up as the ranks do.
trap '' USR1

. launch/env.sh
"${PYTHON:-python}" -m deepspeed.launcher.runner --quiet \
    --hostfile "$HOSTFILE" --no_ssh --node_rank "$SLURM_NODEID" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --enable_each_rank_log "$LOGS" \
    launch/pretrain.py "$@" &
launcher=$!
# `scancel` sends SIGTERM: the launcher passes it on, and gives the ranks 30 s to save.
trap 'kill -TERM "$launcher" 2>/dev/null' TERM
while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait` early
    wait "$launcher"
done
wait "$launcher"
code=$?

if [ "$code" -ne 0 ]; then
    echo "node $SLURM_NODEID ($(hostname)): the ranks ended with exit code $code"
    # srun ends all other nodes when this one reports. Their ranks know within seconds too, and
    # shall end by themselves: with the reason in their logs, and with their own exit code. After
    # a save (75) all have agreed to leave already.
    if [ "$code" -eq 75 ]; then sleep 2; else sleep 8; fi
fi
exit "$code"
