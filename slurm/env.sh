# Sourced by the jobs of this folder, and again by each of their tasks: where the processes of a job meet.
#
# MASTER_ADDR is the address of the job's first node, MASTER_PORT follows from the job's number (so two jobs on a node
# do not meet, and a job that is requeued takes another), the network interface is the one that leads there. What is
# set already stays: export NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, MASTER_ADDR or MASTER_PORT to decide otherwise.

if [[ -z ${MASTER_ADDR:-} ]]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # not head: it would break the pipe
    address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR=${address:-$first}
fi
if [[ -z ${MASTER_PORT:-} ]]; then
    sum=$(printf '%s' "$SLURM_JOB_ID/${SLURM_RESTART_COUNT:-0}" | cksum | cut -d ' ' -f 1)
    export MASTER_PORT=$((15000 + sum % 15000)) # below the ports that systems give away
fi
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun of Slurm from 22.05 on does not take it from the job
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# The interface of this node that leads to the first: the one with the address itself, on the first.
interface_to() {
    local address found
    address=$(getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }' || true)
    found=$(ip -o addr show to "${address:-$1}" 2>/dev/null | awk 'NR == 1 { print $2 }' || true)
    if [[ -z $found ]]; then
        found=$(ip -o route get "${address:-$1}" 2>/dev/null | sed -n '1s/.* dev \([^ ]*\).*/\1/p' || true)
    fi
    printf '%s' "$found"
}

if [[ ${SLURM_JOB_NUM_NODES:-1} -gt 1 && -n ${SLURM_PROCID:-} ]]; then
    interface=$(interface_to "$MASTER_ADDR")
    if [[ -n $interface ]]; then
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
    fi
fi

# in_tasks SCRIPT ARGUMENTS: the script in every task of the job, one a GPU; where one fails, all end.
in_tasks() {
    # shellcheck disable=SC2016 # expanded by each task
    supervise srun --kill-on-bad-exit=1 bash -c 'set -euo pipefail; . slurm/env.sh; exec .venv/bin/python "$@"' task "$@"
}

# supervise COMMAND: runs it and ends the job as it ended, or has the job queued again:
#   stopped by a signal   SIGUSR1 ahead of the time limit (--signal) and SIGTERM of a preemption are passed on, the run
#                         saves and ends with 85. Always queued again.
#   86                    a run that hung and told so; also a node that is lost, and a command that a signal ended
#                         before it could save. Queued again VLM_MAX_REQUEUES times (10), counted in the job's comment.
# What was cancelled, or failed in another way, is not.
supervise() {
    local said status=0 running
    said=$(mktemp)
    "$@" 2> >(tee "$said" >&2) &
    running=$!
    trap 'echo "slurm: told to stop"; kill -USR1 "$running" 2>/dev/null || true' USR1 TERM
    while true; do # a signal that comes ends `wait`, not the command
        wait "$running" && status=0 || status=$?
        kill -0 "$running" 2>/dev/null || break
    done
    if [[ $status != 0 ]]; then
        after_failure "$(status_of_tasks "$status" "$said")"
    fi
    rm -f "$said"
}

# srun ends the other tasks when the first has ended, and then with a status of its own: what each ended with, it says.
status_of_tasks() {
    local asked
    for asked in 85 86; do
        if [[ $1 == "$asked" ]] || grep -q "^srun: error: .*Exited with exit code $asked\$" "$2"; then
            echo "$asked"
            return
        fi
    done
    echo "$1"
}

# after_failure STATUS: queues the job again where that helps, otherwise ends it with the status.
after_failure() {
    local lost
    trap - USR1 TERM
    if [[ $(squeue --noheader --job "$SLURM_JOB_ID" --format=%T) != RUNNING ]]; then
        exit "$1" # cancelled, or queued again by Slurm itself
    fi
    case $1 in
    85) requeue "stopped by a signal, and saved" ;;
    86) requeue_if_few "the run hung" ;;
    138 | 143) requeue_if_few "ended by a signal" ;; # 128 + SIGUSR1 or SIGTERM: it did not listen yet
    2 | 3) ;;                                      # the user's error, or the numbers': it would come again
    *)
        lost=$(lost_nodes)
        [[ -z $lost ]] || requeue_if_few "lost $lost"
        ;;
    esac
    exit "$1"
}

requeue_if_few() {
    local most=${VLM_MAX_REQUEUES:-10} count comment
    comment=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Comment=//p')
    count=$(sed -n 's/.*failures:\([0-9]*\)$/\1/p' <<<"$comment")
    count=$((${count:-0} + 1))
    if ((count > most)); then
        echo "slurm: $1, after $most requeues for such reasons (VLM_MAX_REQUEUES): not queued again"
        return
    fi
    comment=$(sed 's/ *failures:[0-9]*$//' <<<"$comment")
    scontrol update "JobId=$SLURM_JOB_ID" "Comment=${comment:+$comment }failures:$count"
    requeue "$1 ($count of $most)"
}

requeue() {
    echo "slurm: $1: job $SLURM_JOB_ID is queued again and goes on from its last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 600 # Slurm ends this shell
}

# The nodes of the job that start no process any more.
lost_nodes() {
    local node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        timeout 30 srun --overlap --nodes=1 --ntasks=1 --gres=none --nodelist="$node" true >/dev/null 2>&1 || echo "$node"
    done | paste -sd ' '
}

# split_recipe DEFAULT ARGUMENTS: sets `recipe` to the first argument where it is one, `rest` to the others.
split_recipe() {
    recipe=$1
    shift
    if [[ $# -gt 0 && $1 != *=* && $1 != -* ]]; then
        recipe=$1
        shift
    fi
    rest=("$@")
}
