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
sequences=(--train 0 --test 0 --sequences 600 --sequences-test 96) places=40
made_from=$({
    echo "${corpus[@]}" "${sharding[@]}" "${sequences[@]}" $places
    cat vlm/sources/common_chat.py vlm/sources/*shapes.py tools/render_shapes.py tools/make_shards.py \
        vlm/data/shard*.py vlm/data/video*.py
} | cksum)
if [ -f "$data/.made_from" ] && [ "$(cat "$data/.made_from")" != "$made_from" ]; then
    echo "make demo: the programs that made $data have changed; removing it and making it again"
    rm -rf "$data"
fi
mkdir -p "$data"
echo "$made_from" >"$data/.made_from"
# ViT-LLaMA reads pixels; the others read features of frames, and a language model that has only ever read text.
kind=shards llama=llama speech=questions stages=("$system.demo")
if [ "$system" != vit_llama ]; then kind=shards_features; fi
if [ "$system" = video_llama ]; then
    llama=llama_dialogues speech=dialogues stages=(video_llama.demo_pretrain video_llama.demo)
fi
if [ "$system" = video_chatgpt ]; then # what happens when, in videos of several actions
    kind=sequences llama=llama_segments speech=segments
fi
# Meanwhile, on one core, a language model learns to read: it needs nothing of the corpus.
reading=
if [ $kind != shards ]; then
    read_from=$(cat vlm/models/{text_base,story_rows,story_dialogues,story_segments,llama_base}.py \
        vlm/sources/common_{stories,shapes,chat}.py \
        vlm/data/{views,templates,chat_templates,time_axis,sampling,prompts,tokenizers}.py \
        tools/pretrain_text.py | cksum)
    if [ -f "$data/.${llama}_made_from" ] && [ "$(cat "$data/.${llama}_made_from")" != "$read_from" ]; then
        echo "make demo: the programs that made $data/$llama have changed; removing it and making it again"
        rm -rf "${data:?}/$llama"
    fi
    echo "$read_from" >"$data/.${llama}_made_from"
    if [ ! -d "$data/$llama" ]; then
        echo "make demo: teaching a tiny LLaMA to read, on text alone, beside what follows"
        OMP_NUM_THREADS=1 $python tools/pretrain_text.py --threads 1 --out "$data/$llama" --speech "$speech" \
            > >(sed -u 's/^/tiny LLaMA: /') 2>&1 &
        reading=$!
        trap '[ -z "$reading" ] || kill "$reading" 2>/dev/null' EXIT
    fi
fi
if [ $kind = sequences ] && { [ ! -f "$data/$kind/train/manifest.json" ] || [ ! -f "$data/$kind/test/manifest.json" ]; }; then
    echo "make demo: rendering videos of several moving-shapes actions and making shards of them in $data"
    $python tools/render_shapes.py --out "$data/corpus_sequences" "${sequences[@]}"
    encoder=demo
    for split in train test; do
        features=$data/features/sequences_$split.safetensors
        $python tools/extract_features.py shapes --root "$data/corpus_sequences" --split sequences_$split \
            --encoder "$encoder" --frames $places --name glimpse --out "$features" --workers 2
        $python tools/make_shards.py shapes --root "$data/corpus_sequences" --split sequences_$split \
            --out "$data/$kind/$split" "${sharding[@]}" --workers 2 --features "$features"
        encoder=$data/features/sequences_train.encoder.safetensors
    done
elif [ ! -f "$data/$kind/train/manifest.json" ] || [ ! -f "$data/$kind/test/manifest.json" ]; then
    echo "make demo: rendering the moving-shapes corpus and making shards of it in $data"
    $python tools/render_shapes.py --out "$data/corpus" "${corpus[@]}"
    encoder=demo
    for split in train test; do
        features=()
        if [ $kind = shards_features ]; then
            features=(--annotations "$data/features/$split.safetensors")
            $python tools/extract_features.py shapes --root "$data/corpus" --split $split --encoder "$encoder" \
                --out "${features[1]}" --workers 2
            encoder=$data/features/train.encoder.safetensors
        fi
        $python tools/make_shards.py shapes --root "$data/corpus" --split $split --out "$data/$kind/$split" \
            "${sharding[@]}" --workers 2 "${features[@]}"
    done
fi
if [ -n "$reading" ]; then
    echo "make demo: waiting for the tiny LLaMA"
    if ! wait "$reading"; then
        echo "make demo: the tiny LLaMA could not be made (see above)" >&2
        exit 1
    fi
    reading=
fi

run=$runs/$system
for stage in "$run"_pretrain "$run"; do
    if [ -f "$stage/.lock" ] && command -v flock >/dev/null && ! flock -n "$stage/.lock" true; then
        echo "make demo: $(cat "$stage/.lock") is writing $stage: wait for it, or end it" >&2
        exit 2
    fi
done
if [ -f "$run/report.html" ]; then
    echo "make demo: keeping the finished run as $run.previous"
    for stage in "$run"_pretrain "$run"; do
        rm -rf "$stage.previous"
        if [ -d "$stage" ]; then mv "$stage" "$stage.previous"; fi
    done
elif [ -d "$run/checkpoints" ]; then
    echo "make demo: $run was interrupted; going on from its last checkpoint"
elif [ -d "${run}_pretrain/checkpoints" ]; then
    echo "make demo: ${run}_pretrain was interrupted, or its second stage has not begun; going on from there"
fi

gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
if [ "$gpus" -lt 2 ]; then export DS_ACCELERATOR=cpu; fi # two processes need two GPUs, or none
for stage in "${stages[@]}"; do
    overrides=(run_dir="$run")
    if [[ $stage == *.demo_pretrain ]]; then
        overrides=(run_dir="${run}_pretrain")
        if [ -f "${run}_pretrain/report.html" ]; then continue; fi # done before
    elif [ ${#stages[@]} -gt 1 ]; then
        overrides+=(model.init_from="${run}_pretrain")
    fi
    if [ "$data" != data/demo ]; then
        overrides+=(data.shards="$data/$kind/train")
        if [[ $stage == *.demo ]]; then overrides+=(eval.shards="$data/$kind/test"); fi
        if [ $kind != shards ]; then
            overrides+=(model.llama.path="$data/$llama" inputs.tokenizer="$data/$llama/tokenizer.model")
        fi
    fi
    PATH=$PWD/.venv/bin:$PATH .venv/bin/deepspeed --num_gpus 2 launch/train.py \
        --deepspeed_config ds_configs/cpu.json --recipe "$stage" "${overrides[@]}"
done
echo "make demo: done; the report is $run/report.html" # once more: the launcher has had the last word
