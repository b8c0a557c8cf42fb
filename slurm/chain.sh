#!/usr/bin/env bash
# Pretraining, fine-tuning that begins with it, and evaluation of that: three jobs, each when the one before ended well.
#
#     slurm/chain.sh [OPTION …] [RECIPE_A [key=value …]] [RECIPE_B [key=value …]]
#     slurm/chain.sh --nodes=4 video_llama.pretrain_vicuna13b data.workers=4 video_llama.finetune_vicuna13b
#     slurm/chain.sh video_mae.ssv2_s vit_llama.ssv2_s model.init_from=runs/video_mae/ssv2_s
#
# Without recipes: both stages of Video-LLaMA. Settings after a recipe are that recipe's (those of RECIPE_B are of its
# evaluation too). OPTIONs of sbatch are of all three jobs, each one word (--nodes=4); so are variables such as
# SBATCH_PARTITION, and VLM_DS_CONFIG. RECIPE_B gets model.init_from=RUN_A, unless it or its settings name another
# (vit_llama's ssv2 recipes do: a published file).
# Prints the jobs' numbers. A job whose forerunner failed is cancelled (--kill-on-invalid-dep).
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' slurm/chain.sh # what stands above
    exit
fi

options=()
while [[ $# -gt 0 && $1 == -* ]]; do
    options+=("$1")
    shift
done
planned=$(.venv/bin/python -m vlm.run.chain "$@") # arguments of the three jobs, an empty line after each

jobs=()
for job in pretrain finetune evaluate; do
    words=()
    while IFS= read -r word && [[ -n $word ]]; do
        words+=("$word")
    done
    after=()
    [[ ${#jobs[@]} -eq 0 ]] || after=("--dependency=afterok:${jobs[-1]}" --kill-on-invalid-dep=yes)
    if ! number=$(sbatch --parsable "${options[@]}" "${after[@]}" "slurm/$job.sbatch" "${words[@]}"); then
        [[ ${#jobs[@]} -eq 0 ]] || scancel "${jobs[@]}"
        echo "slurm/chain.sh: sbatch did not accept slurm/$job.sbatch; no job of the chain is left" >&2
        exit 1
    fi
    jobs+=("${number%%;*}") # JOB;CLUSTER where there are several
    echo "$job ${jobs[-1]}"
done <<<"$planned"
