#!/usr/bin/env bash
# Pretraining, fine-tuning that begins with it, and evaluation of that: three jobs, each when the one before ended well.
#
#     slurm/chain.sh [OPTION …] [RECIPE_A [key=value …]] [RECIPE_B [key=value …]]
#     slurm/chain.sh --nodes=4 video_llama.pretrain_vicuna13b data.workers=4 video_llama.finetune_vicuna13b
#
# Without recipes: both stages of Video-LLaMA. Settings after a recipe are that recipe's (those of RECIPE_B are of its
# evaluation too). OPTIONs of sbatch are of all three jobs, each one word (--nodes=4); so are variables such as
# SBATCH_PARTITION, and VLM_DS_CONFIG. RECIPE_B gets model.init_from=RUN_A, unless it or its settings name another.
# Prints the jobs' numbers. A job whose forerunner failed is cancelled (--kill-on-invalid-dep).
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() {
    echo "slurm/chain.sh: $1" >&2
    exit 2
}

# plan RECIPE SETTINGS: all its fields, as JSON; or what is wrong with them.
plan() {
    .venv/bin/python launch/train.py --dry-run --deepspeed_config "${VLM_DS_CONFIG:-ds_configs/zero2.json}" \
        --recipe "$@"
}

# field NAME PLAN: its value; "null"; nothing where there is no such field.
field() {
    .venv/bin/python -c '
import json, sys
value = json.loads(sys.argv[2])["config"]
for name in sys.argv[1].split("."):
    value = value.get(name, "") if isinstance(value, dict) else ""
print("null" if value is None else value)' "$1" "$2"
}

options=() first=() second=()
while [[ $# -gt 0 && $1 == -* ]]; do
    options+=("$1")
    shift
done
[[ $# -eq 0 || $1 == *=* ]] && first=(video_llama.pretrain)
while [[ $# -gt 0 && (${#first[@]} -eq 0 || $1 == *=*) ]]; do
    first+=("$1")
    shift
done
if [[ $# -gt 0 ]]; then
    second=("$@")
elif [[ ${first[0]} == video_llama.pretrain ]]; then
    second=(video_llama.finetune)
else
    refuse "which recipe goes on from what ${first[0]} learns? Add RECIPE_B"
fi
for setting in "${second[@]:1}"; do
    [[ $setting == *=* ]] || refuse "$setting is neither key=value nor one of the two recipes, ${first[0]} and ${second[0]}"
done

plan_a=$(plan "${first[@]}")
plan_b=$(plan "${second[@]}")
run_a=$(field run_dir "$plan_a")
run_b=$(field run_dir "$plan_b")
[[ $run_a != "$run_b" ]] || refuse "both recipes train in $run_a: give one of them another run_dir=DIR"
[[ $(field eval "$plan_b") != null ]] || refuse "${second[0]} has no test (eval is none), so nothing can be evaluated"
begins=$(field model.init_from "$plan_b")
[[ -n $begins ]] || refuse "${second[0]} cannot begin with another run: its model has no init_from"
if [[ " ${second[*]}" != *" model.init_from="* && $begins != "$run_a" ]]; then
    if [[ $begins == null || $begins == "$(field run_dir "$(plan "${first[0]}")")" ]]; then
        second+=("model.init_from=$run_a")
    else
        echo "note: ${second[0]} begins with $begins, as it says itself, not with $run_a" >&2
    fi
fi
tested=("${second[0]}" "--checkpoint=$run_b")
for setting in "${second[@]:1}" "run_dir=${run_b}_test"; do
    [[ $setting == "run_dir=$run_b" ]] || tested+=("$setting")
done

# submit JOB OPTIONS -- ARGUMENTS: its number, in `number`. Where it is not accepted, those before it are cancelled.
jobs=()
submit() {
    local job=$1 own=()
    shift
    while [[ $1 != -- ]]; do
        own+=("$1")
        shift
    done
    shift
    if ! number=$(sbatch --parsable "${options[@]}" "${own[@]}" "slurm/$job.sbatch" "$@"); then
        [[ ${#jobs[@]} -eq 0 ]] || scancel "${jobs[@]}"
        refuse "sbatch did not accept slurm/$job.sbatch; no job is left"
    fi
    number=${number%%;*} # JOB;CLUSTER where there are several
    jobs+=("$number")
    echo "$job $number"
}

after=(--kill-on-invalid-dep=yes)
submit pretrain -- "${first[@]}"
submit finetune "${after[@]}" "--dependency=afterok:$number" -- "${second[@]}"
submit evaluate "${after[@]}" "--dependency=afterok:$number" -- "${tested[@]}"
