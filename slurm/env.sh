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
    srun --kill-on-bad-exit=1 bash -c 'set -euo pipefail; . slurm/env.sh; exec .venv/bin/python "$@"' task "$@"
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
