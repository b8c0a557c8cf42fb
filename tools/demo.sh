#!/usr/bin/env bash
# The demo of one system, whole: corpus -> shards -> training by DeepSpeed in two processes -> test -> report.
#     make demo [SYSTEM=vit_llama]          or: tools/demo.sh vit_llama data/demo runs/demo
#
# Corpus and shards are made once. A finished run is kept as <run>.previous and training begins anew; a run that was
# interrupted goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
system=${1:-vit_llama} data=${2:-data/demo} runs=${3:-runs/demo}
python=.venv/bin/python

available=$(grep -l '^def demo(' vlm/recipes/*.py | xargs -n 1 basename | sed 's/\.py$//' | tr '\n' ' ')
if [[ " $available" != *" $system "* ]]; then
    echo "make demo: there is no demo of the system '$system'. Available now: $available" >&2
    exit 2
fi

# Corpus and shards follow from these numbers and files alone, so they are made again when one of them changes. Both
# programs continue what was interrupted.
corpus=(--train 3200 --test 192 --sequences 80) sharding=(--shard-samples 400)
made_from=$({
    echo "${corpus[@]}" "${sharding[@]}"
    cat vlm/sources/*shapes.py tools/render_shapes.py tools/make_shards.py vlm/data/shard*.py vlm/data/video.py
} | cksum)
if [ -f "$data/.made_from" ] && [ "$(cat "$data/.made_from")" != "$made_from" ]; then
    echo "make demo: the programs that made $data have changed; removing it and making it again"
    rm -rf "$data"
fi
mkdir -p "$data"
echo "$made_from" >"$data/.made_from"
if [ ! -f "$data/shards/train/manifest.json" ] || [ ! -f "$data/shards/test/manifest.json" ]; then
    echo "make demo: rendering the moving-shapes corpus and making shards of it in $data"
    $python tools/render_shapes.py --out "$data/corpus" "${corpus[@]}"
    for split in train test; do
        $python tools/make_shards.py shapes --root "$data/corpus" --split $split --out "$data/shards/$split" \
            "${sharding[@]}" --workers 2
    done
fi

run=$runs/$system
if [ -f "$run/.lock" ] && command -v flock >/dev/null && ! flock -n "$run/.lock" true; then
    echo "make demo: $(cat "$run/.lock") is writing $run: wait for it, or end it" >&2
    exit 2
fi
if [ -f "$run/report.html" ]; then
    echo "make demo: keeping the finished run as $run.previous"
    rm -rf "$run.previous"
    mv "$run" "$run.previous"
elif [ -d "$run/checkpoints" ]; then
    echo "make demo: $run was interrupted; going on from its last checkpoint"
fi

gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
if [ "$gpus" -lt 2 ]; then export DS_ACCELERATOR=cpu; fi # two processes need two GPUs, or none
overrides=(run_dir="$run")
if [ "$data" != data/demo ]; then
    overrides+=(data.shards="$data/shards/train" eval.shards="$data/shards/test")
fi
PATH=$PWD/.venv/bin:$PATH .venv/bin/deepspeed --num_gpus 2 launch/train.py \
    --deepspeed_config ds_configs/cpu.json --recipe "$system.demo" "${overrides[@]}"
echo "make demo: done; the report is $run/report.html" # once more: the launcher has had the last word
