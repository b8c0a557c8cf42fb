# Sourced by the jobs of this folder: how they start tasks, and what follows from how these end. Where the tasks meet
# (address, port, network interface) they find out themselves (vlm/rendezvous.py).

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun of Slurm from 22.05 on does not take it from the job
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# This job. In an array the SLURM_JOB_ID of one task is that of the whole array too, to squeue and scontrol.
this_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
this_job=${this_job:-${SLURM_JOB_ID:-}}

# in_tasks SCRIPT ARGUMENTS: the script in every task of the job, one a GPU; where one fails, all end. A job that
# was given other nodes while it waited (docs/cluster.md) keeps SLURM_NTASKS of its first ones.
in_tasks() {
    local tasks=${SLURM_NTASKS:-1} each=${SLURM_NTASKS_PER_NODE:-1}
    ((tasks % each)) || tasks=$((SLURM_JOB_NUM_NODES * each))
    supervise srun "--ntasks=$tasks" --kill-on-bad-exit=1 .venv/bin/python "$@"
}

# supervise COMMAND: runs it and ends the job as it ended, or has the job queued again:
#   stopped by a signal   SIGUSR1 ahead of the time limit (--signal) and SIGTERM of a preemption are passed on, the run
#                         saves and ends with 85. Always queued again.
#   86                    a run that hung and told so; also a node that is lost, and a task that was killed (memory, a
#                         crash, NCCL's watchdog) or that a signal ended before it could save. Queued again
#                         VLM_MAX_REQUEUES times (10), counted in the job's comment, anew after a start that ran
#                         for six hours: it is no fault that comes each time.
# What was cancelled, or failed in another way, is not.
supervise() {
    local said errors copier running='' status _
    trap 'echo "slurm: told to stop"; [[ -z $running ]] || kill -USR1 "$running" 2>/dev/null || true' USR1 TERM
    said=$(mktemp)
    exec {errors}> >(exec tee "$said" >&2)
    copier=$!
    "$@" 2>&"$errors" {errors}>&- &
    running=$!
    exec {errors}>&-
    while kill -0 "$running" 2>/dev/null; do # a signal that comes ends `wait`, not the command
        wait "$running" || true
    done
    wait "$running" && status=0 || status=$?
    for _ in {1..50}; do # until all that was said is in the file
        kill -0 "$copier" 2>/dev/null || break
        sleep 0.1
    done
    [[ $status == 0 ]] || after_failure "$(status_of_tasks "$status" "$said")"
    rm -f "$said"
}

# status_of_tasks STATUS FILE: srun ends the other tasks when the first has ended, and then with a status of its own; what
# the tasks ended with, it says: 85 or 86 of any, or else what the first did.
status_of_tasks() {
    local first
    first=$(grep -E '^srun: error: [^ ]+: tasks? [^ ]+: ' "$2" | sed 's/^srun: error: [^ ]*: tasks\? [^ ]*: //' || true)
    case $first in
    *"exit code 85"*) echo 85 ;;
    *"exit code 86"*) echo 86 ;;
    "Exited with exit code "*) sed -n '1s/.* //p' <<<"$first" ;;
    "Terminated"*) echo 143 ;;
    "User defined signal 1"*) echo 138 ;;
    ?*) echo 137 ;; # Killed, Aborted, Segmentation fault, Bus error, Out Of Memory, …
    *) echo "$1" ;;
    esac
}

# after_failure STATUS: queues the job again where that helps, otherwise ends it with the status.
after_failure() {
    local lost
    trap - USR1 TERM
    if [[ $(squeue --noheader --job "$this_job" --format=%T) != RUNNING ]]; then
        exit "$1" # cancelled, or queued again by Slurm itself
    fi
    case $1 in
    85) requeue "stopped by a signal, and saved" ;;
    86) requeue_if_few "the run hung" ;;
    138 | 143) requeue_if_few "ended by a signal" ;; # 128 + SIGUSR1 or SIGTERM: it did not listen yet
    12[89] | 1[3-9]?) requeue_if_few "a task was killed" ;;
    2 | 3) ;;                                        # the user's error, or the numbers': it would come again
    *)
        lost=$(lost_nodes)
        [[ -z $lost ]] || requeue_if_few "lost $lost"
        ;;
    esac
    exit "$1"
}

requeue_if_few() {
    local most=${VLM_MAX_REQUEUES:-10} count comment
    comment=$(scontrol show job "$this_job" | sed -n 's/ *$//; s/^ *Comment=\((null)\)\?//p')
    count=$(sed -n 's/.*failures:\([0-9]*\)$/\1/p' <<<"$comment")
    ((SECONDS < 6 * 3600)) || count=0
    count=$((${count:-0} + 1))
    if ((count > most)); then
        echo "slurm: $1, after $most requeues for such reasons (VLM_MAX_REQUEUES): not queued again"
        return
    fi
    comment=$(sed 's/ *failures:[0-9]*$//' <<<"$comment")
    scontrol update "JobId=$this_job" "Comment=${comment:+$comment }failures:$count"
    requeue "$1 ($count of $most)"
}

requeue() {
    echo "slurm: $1: job $this_job is queued again and goes on from its last checkpoint"
    scontrol requeue "$this_job"
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
