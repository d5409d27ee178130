#!/usr/bin/env bash
# One node's part of a job: srun starts this once a node, and it starts the node's ranks.
#
# Called by pretrain.sbatch with RANKS_PER_NODE, LOGS, MASTER_ADDR and MASTER_PORT in the
# environment; arguments are the run's flags. The exit code is that of the first rank that failed.
#
# Why not a launcher here: torchrun makes every exit code 1, so that a run which was stopped and
# saved (75) looks like one that failed; DeepSpeed's gives ranks 30 s after SIGTERM, less than a
# large model takes to save; and both die of the signal ahead of the time limit.
set -uo pipefail

# Signals of Slurm go to every process of the step. The ranks take note of them and save; this
# shell waits for that. (An ignored signal stays ignored in a child until it takes it up.)
trap '' USR1 TERM

. launch/env.sh
export WORLD_SIZE=$((SLURM_NNODES * RANKS_PER_NODE)) LOCAL_WORLD_SIZE=$RANKS_PER_NODE
export CROSS_SIZE=$SLURM_NNODES
ranks=()
for ((local = 0; local < RANKS_PER_NODE; local++)); do
    rank=$((SLURM_NODEID * RANKS_PER_NODE + local))
    RANK=$rank LOCAL_RANK=$local "${PYTHON:-python}" "${SCRIPT:-launch/pretrain.py}" "$@" \
        > "$LOGS/rank-$rank.log" 2>&1 &
    ranks+=($!)
done

code=0
killer=
for _ in "${ranks[@]}"; do
    wait -n
    ended=$?
    # 127: a rank's own, or none was left, as of ranks that end together it may miss one.
    if [ "$ended" -ne 0 ] && [ "$ended" -ne 127 ] && [ "$code" -eq 0 ]; then
        code=$ended
        # The watchdog ends the others in seconds; this is for those that never met.
        (
            trap - TERM
            for _ in {1..30}; do sleep 1; done
            kill -KILL "${ranks[@]}"
        ) < /dev/null > /dev/null 2>&1 & # (srun waits for whoever has its output)
        killer=$!
        disown
    fi
done
for pid in "${ranks[@]}"; do # the shell keeps the exit code of each, missed or not
    wait "$pid"
    ended=$?
    if [ "$code" -eq 0 ]; then code=$ended; fi
done

if [ "$code" -ne 0 ]; then
    [ -z "$killer" ] || kill "$killer"
    echo "node $SLURM_NODEID ($HOSTNAME): the first rank to fail had exit code $code"
    # srun ends all other nodes when this one reports. Their ranks know within seconds too, and
    # shall end by themselves: with the reason in their logs, and with their own exit code. After
    # a save (75) all have agreed to leave already.
    if [ "$code" -eq 75 ]; then sleep 2; else sleep 8; fi
fi
exit "$code"
