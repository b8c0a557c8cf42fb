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
    local said errors copier running='' told='' status _
    trap 'echo "slurm: told to stop"; told=yes
        [[ -z $running ]] || kill -USR1 "$running" 2>/dev/null || true' USR1 TERM
    said=$(mktemp)
    exec {errors}> >(exec tee "$said" >&2)
    copier=$!
    "$@" 2>&"$errors" {errors}>&- &
    sleep 0.2 || true # the copy of this shell that is to become the command may swallow a signal until it has
    running=$!
    [[ -z $told ]] || kill -USR1 "$running" 2>/dev/null || true # it came before there was whom to tell
    exec {errors}>&-
    while kill -0 "$running" 2>/dev/null; do # a signal that comes ends `wait`, not the command
        wait "$running" || true
    done
    wait "$running" && status=0 || status=$?
    for _ in {1..50}; do # until all that was said is in the file
        kill -0 "$copier" 2>/dev/null || break
        sleep 0.1 || true # a signal to all processes of the job ends this one too
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

# ask COMMAND: a command of Slurm, which is tried again every VLM_SLURM_RETRY_SECONDS (5; tests say 0) while the controller
# does not answer: at most 24 times, and for about two minutes. Status 2: there was no answer. Status 1: the answer was no,
# which would come again.
ask() {
    local error tries=0 end=$((SECONDS + 120))
    until error=$("$@" 2>&1 >&3); do
        if grep -qE 'Invalid job id|already completing|pending execution|permission denied|disabled' <<<"$error"; then
            echo "$error" >&2
            return 1
        fi
        if ((++tries == 24 || SECONDS >= end)); then
            echo "slurm: still no answer, given up: $*: $error" >&2
            return 2
        fi
        ((tries > 1)) || echo "slurm: no answer, asked again for two minutes: $*: $error" >&2
        sleep "${VLM_SLURM_RETRY_SECONDS:-5}" || true
    done 3>&1
    [[ -z $error ]] || echo "$error" >&2
}

# after_failure STATUS: queues the job again where that helps, otherwise ends it with the status.
after_failure() {
    local lost state answer=0
    trap '' USR1 TERM # a second signal must not end this shell before the job is queued again
    state=$(ask squeue --noheader --job "$this_job" --format=%T) || answer=$?
    if ((answer == 2)) && [[ $1 == 8[56] ]]; then
        : # nobody knows; had it been cancelled, Slurm would have killed this shell before two minutes were over (KillWait)
    elif [[ $state != RUNNING ]]; then
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
    local most=${VLM_MAX_REQUEUES:-10} count comment known=yes
    comment=$(ask scontrol show job "$this_job" | sed -n 's/ *$//; s/^ *Comment=\((null)\)\?//p') || known=''
    count=$(sed -n 's/.*failures:\([0-9]*\)$/\1/p' <<<"$comment")
    ((SECONDS < 6 * 3600)) || count=0
    count=$((${count:-0} + 1))
    if ((count > most)); then
        echo "slurm: $1, after $most requeues for such reasons (VLM_MAX_REQUEUES): not queued again"
        return
    fi
    comment=$(sed 's/ *failures:[0-9]*$//' <<<"$comment")
    if [[ -z $known ]] || ! ask scontrol update "JobId=$this_job" "Comment=${comment:+$comment }failures:$count"; then
        echo "slurm: the job's comment could not be read or changed: what counts is how often the job has begun again"
        if ((${SLURM_RESTART_COUNT:-0} >= most)); then
            echo "slurm: $1, after $SLURM_RESTART_COUNT starts (VLM_MAX_REQUEUES=$most): not queued again"
            return
        fi
    fi
    requeue "$1 ($count of $most)"
}

requeue() {
    echo "slurm: $1: job $this_job is queued again and goes on from its last checkpoint"
    if ask scontrol requeue "$this_job"; then
        trap - TERM
        sleep 600 # Slurm ends this shell, by SIGTERM
    else
        echo "slurm: the requeue did not succeed; sbatch with the same words goes on with the run"
    fi
}

# The nodes of the job that start no process any more.
lost_nodes() {
    local node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        # SIGTERM alone may not end it, since this shell ignores it
        timeout --kill-after=5 30 srun --overlap --nodes=1 --ntasks=1 --gres=none --nodelist="$node" true \
            >/dev/null 2>&1 || echo "$node"
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
