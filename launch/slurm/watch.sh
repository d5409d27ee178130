#!/usr/bin/env bash
# Runs in the queue, and the lines of one.
#
#     launch/slurm/watch.sh                     my jobs: state, time, and how far the run has come
#     launch/slurm/watch.sh JOB|RUN_DIR         follow rank 0 of the job's newest start
#     launch/slurm/watch.sh JOB|RUN_DIR RANK    another rank, or `all`
#     LINES=50 FOLLOW=no launch/slurm/watch.sh JOB     print the last lines and end
set -euo pipefail

last_step() { # of a run's metrics, a JSON object a line
    tail -n 1 "$1/metrics.jsonl" 2>/dev/null |
        sed -nE 's/.*"step": ([0-9]+), "loss": ([0-9.a-z]+).*/step \1, loss \2/p' || true
}

if [ $# -eq 0 ]; then
    printf '%-10s %-18s %-11s %-12s %-6s %-28s %s\n' JOB NAME STATE TIME NODES RUN PROGRESS
    squeue --me --noheader --format '%i|%j|%T|%M|%D|%k' |
        while IFS='|' read -r job name state time nodes run; do
            printf '%-10s %-18s %-11s %-12s %-6s %-28s %s\n' \
                "$job" "$name" "$state" "$time" "$nodes" "$run" "$(last_step "$run")"
        done
    exit
fi

run=$1
if [ ! -d "$run" ]; then
    run=$(scontrol show job "$1" 2>/dev/null | sed -n 's/^ *Comment=//p')
    if [ ! -d "$run" ]; then
        echo "watch.sh: $1 is neither a run's folder nor a job of pretrain.sbatch" >&2
        exit 64
    fi
fi
newest=$(ls -1dt "$run"/logs/*/ 2>/dev/null | head -n 1)
if [ -z "$newest" ]; then
    echo "watch.sh: $run has no logs of a job" >&2
    exit 66
fi
rank=${2:-0}
pattern=rank-$rank.log
[ "$rank" = all ] && pattern='rank-*.log'
mapfile -t files < <(find "$newest" -name "$pattern" | sort -V)
if [ ${#files[@]} -eq 0 ]; then
    echo "watch.sh: $newest has no log of rank $rank" >&2
    exit 66
fi
echo "$run: $(last_step "$run")"
follow=(--follow=name --retry)
[ "${FOLLOW:-yes}" = no ] && follow=()
exec tail --lines="${LINES:-20}" "${follow[@]}" "${files[@]}"
