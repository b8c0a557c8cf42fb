"""Video-LLaMA's two stages as a user runs them: published annotations -> shards -> stage 1 -> stage 2 -> captions."""

import csv
import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from launching import ROOT, run
from PIL import Image

from tests.encoded import encode, pictures
from tools.make_shards import main as make_shards
from vlm.data.boundaries import KINDS

SETS = ("webvid", "cc3m", "videochat", "dialogues")


def write_trees(root: Path, clips: list[Path], titles: list[dict], captions: list[str], chats: list[dict], more: list):
    """The published layouts over these clips: WebVid's table, CC3M's TSV, VideoChat's and LLaMA-Factory's JSON."""
    webvid, cc3m, chat, dialogues = (root / name for name in SETS)
    for row, clip in zip(titles, clips):
        place = webvid / "videos" / row["page_dir"] / f"{row['videoid']}.mp4"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, place)
    with (webvid / "results_2M_train.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(titles[0]))
        table.writeheader()
        table.writerows(titles)
    (cc3m / "image").mkdir(parents=True)
    for number, clip in enumerate(clips[: len(captions)]):
        first_picture(clip).save(cc3m / "image" / f"GCC_train_{number:09d}.jpg")
    (cc3m / "Train_GCC-training.tsv").write_text("".join(f"{text}\thttps://a.b/c.jpg\n" for text in captions))
    rows = []
    for row, clip in zip(chats, clips):
        name = row.get("image") or row["video"]
        (chat / name).parent.mkdir(parents=True, exist_ok=True)
        if "image" in row:
            first_picture(clip).save(chat / name)
        else:
            shutil.copy(clip, chat / name)
        rows.append(row)
    (chat / "train.json").write_text(json.dumps(rows))
    for row, clip in zip(more, clips):
        (dialogues / row["videos"][0]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, dialogues / row["videos"][0])
    (dialogues / "train.json").write_text(json.dumps(more))


def first_picture(clip: Path) -> Image.Image:
    with av.open(str(clip)) as container:
        return Image.fromarray(next(container.decode(video=0)).to_ndarray(format="rgb24"))


def make_all(root: Path) -> dict[str, str]:
    """Shards of the four sets, by the command line."""
    sources = dict(zip(SETS, ("webvid", "cc3m", "instruct", "instruct")))
    for name, source in sources.items():
        out = root / "shards" / name
        options = ["--root", str(root / name), "--split", "train", "--out", str(out), "--workers", "1"]
        assert make_shards([source, *options]) == 0
        rejected = json.loads((out / "manifest.json").read_text())["rejected"]
        assert rejected == []
    return {name: str(root / "shards" / name) for name in SETS}


def train(run_dir: Path, mix: str, test: str, *settings: str) -> list[dict]:
    """A few steps of video_llama.debug. Returns the rows of metrics.jsonl."""
    command = [str(ROOT / "launch" / "train.py"), "--deepspeed_config", str(ROOT / "ds_configs" / "cpu.json")]
    command += ["--recipe", "video_llama.debug", f"data.shards={mix}", f"eval.shards={test}", f"run_dir={run_dir}"]
    run([*command, "inputs.max_length=1500", *settings])
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def both_stages(root: Path, shards: dict[str, str]) -> None:
    first = train(
        root / "stage1",
        f"{shards['webvid']}:100,{shards['cc3m']}:24",
        shards["webvid"],
        "steps=3",
        "global_batch_size=8",
        "eval.at_end=false",
    )
    assert [row["step"] for row in first] == [1, 2, 3]
    assert all(np.isfinite(row["loss"]) and row["counts"]["caption"] > 0 for row in first)
    second = train(
        root / "stage2",
        f"{shards['cc3m']}:1,{shards['videochat']}:1,{shards['dialogues']}:1",
        shards["dialogues"],
        "steps=3",
        "global_batch_size=6",
        f"model.init_from={root / 'stage1'}",
        "inputs.caption_end=###",
        'inputs.prompts=["<video> Describe this image in detail."]',
    )
    assert all(row["counts"]["caption"] > 0 and row["counts"]["dialogue"] > 0 for row in second)
    metrics = json.loads((root / "stage2" / "metrics.json").read_text())
    assert {"exact_match", "exact_match_blind"} <= metrics.keys()
    rows = [json.loads(line) for line in (root / "stage2" / "predictions.jsonl").read_text().splitlines()]
    assert all(row["references"] and row["question"] for row in rows)
    assert len(rows) == len(json.loads((root / "dialogues" / "train.json").read_text()))
    assert (root / "stage2" / "report.html").is_file()


@pytest.mark.slow
def test_two_stages(tmp_path):
    """Made-up clips and words."""
    clips = [tmp_path / f"{number}.mp4" for number in range(4)]
    for number, clip in enumerate(clips):
        clip.write_bytes(encode(pictures(4 + 5 * number, seed=number)))
    titles = [{"videoid": f"10{n}", "page_dir": "000001_000050", "name": f"Clip {n}; a bar!"} for n in range(4)]
    chats = [
        {"video": "000001_000050/7.mp4", "QA": [{"q": "What is it?", "a": "A bar."}, {"q": "Why?", "a": "It moves."}]},
        {"image": "8.jpg", "QA": [{"q": "What is it?", "a": "A picture."}]},
    ]
    more = [
        {"messages": [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A bar."}],
         "videos": ["m/1.mp4"]},
    ]  # fmt: skip
    write_trees(tmp_path, clips, titles, ["a bar", "two bars"], chats, more)
    both_stages(tmp_path, make_all(tmp_path))


@pytest.mark.slow
def test_two_stages_on_real_clips(realdata, tmp_path):
    """WebVid's, CC3M's, VideoChat's and LLaMA-Factory's own rows, over real clips."""
    notes = realdata / "annotations"
    clips = sorted((realdata / "videos").glob("*.mp4"), key=lambda clip: clip.stat().st_size)[:9]
    with (notes / "webvid" / "results_2M_val_dev.csv").open(newline="") as file:
        titles = list(csv.DictReader(file))
    tsv = next((notes / "cc3m").glob("*.tsv")).read_text().splitlines()[:6]
    chats = json.loads((notes / "videochat" / "minigpt_caption_3k_sample_dev.json").read_text())[:3]
    talks = json.loads((notes / "videochat" / "llava_complex_reasoning_2k_sample_dev.json").read_text())[:2]
    videos = [{"video": f"000001_000050/{n}.mp4", "QA": row["QA"]} for n, row in enumerate(talks)]
    more = json.loads((notes / "llava_style" / "llamafactory_mllm_video_demo.json").read_text())
    write_trees(tmp_path, clips, titles, [line.partition("\t")[0] for line in tsv], chats + videos, more)
    both_stages(tmp_path, make_all(tmp_path))


@pytest.mark.slow
def test_boundaries_of_real_clips(realdata, tmp_path):
    """The challenge's own rows over real clips: trained a few steps, written by two beams, scored by kind."""
    notes = realdata / "annotations" / "kinetics_gebc"
    rows = json.loads((notes / "loveu_valset_highest_f1_sample_dev.json").read_text())
    kept = dict(list(rows.items())[:3])
    clips = sorted((realdata / "videos").glob("*.mp4"), key=lambda clip: clip.stat().st_size)[2:5]
    tree = tmp_path / "gebc"
    (tree / "clip_fps_15").mkdir(parents=True)
    for video, clip in zip(kept, clips):
        shutil.copy(clip, tree / f"{video}.mp4")
        np.save(tree / "clip_fps_15" / f"{video}.npy", np.ones((5, 8), np.float32))
    (tree / "val.json").write_text(json.dumps(kept))
    out = tmp_path / "shards"
    files = [str(tree / "val.json"), str(notes / "video_info_subset.json"), str(tree / "clip_fps_15")]
    options = ["--root", str(tree), "--split", "val", "--out", str(out), "--workers", "1", "--annotations", *files]
    assert make_shards(["gebc", *options]) == 0
    command = [str(ROOT / "launch" / "train.py"), "--deepspeed_config", str(ROOT / "ds_configs" / "cpu.json")]
    command += ["--recipe", "video_llama.debug_gebc", f"data.shards={out}", f"eval.shards={out}", "steps=3"]
    run([*command, f"run_dir={tmp_path / 'run'}", "eval.generation.num_beams=2"])
    written = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    asked = {(row["boundary_id"], kind) for some in kept.values() for row in some for kind in KINDS}
    assert {(row["id"], row["kind"]) for row in written} == asked
    assert len(written) == len(asked)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"cider", "cider_subject", "overall_cider_rouge_l"} <= metrics.keys(), sorted(metrics)
