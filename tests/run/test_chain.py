"""What the jobs of slurm/chain.sh are told."""

import pytest

from vlm.run.chain import main, plan
from vlm.types import UserError

A, B = "video_llama.debug", "vamos.debug"


def test_both_stages_of_video_llama() -> None:
    chain = plan([])
    assert chain.pretrain == ["video_llama.pretrain"]
    assert chain.finetune == ["video_llama.finetune"], "the recipe begins with that run itself"
    assert chain.evaluate == [
        "video_llama.finetune",
        "--checkpoint=runs/video_llama/finetune",
        "run_dir=runs/video_llama/finetune_test",
    ]
    assert not chain.note


def test_settings_belong_to_the_recipe_before_them() -> None:
    chain = plan(["run_dir=a b", "steps=7", "video_llama.finetune", "run_dir=c", "eval.workers=2"])
    assert chain.pretrain == ["video_llama.pretrain", "run_dir=a b", "steps=7"]
    begins = "model.init_from=a b"  # the recipe names the first one's folder, which is another now
    assert chain.finetune == ["video_llama.finetune", "run_dir=c", "eval.workers=2", begins]
    assert chain.evaluate == ["video_llama.finetune", "--checkpoint=c", "eval.workers=2", begins, "run_dir=c_test"]


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        ([A, "run_dir=a", B, "run_dir=b"], ["model.init_from=a"]),
        ([A, "run_dir=a", B, "run_dir=b", "model.init_from=x"], ["model.init_from=x"]),
        ([A, "run_dir=a", B, "run_dir=b", "model.init_from=none"], ["model.init_from=none"]),
        (["video_llama.demo_pretrain", "video_llama.demo"], []),
        (["video_llama.demo_pretrain", "run_dir=x", "video_llama.demo"], ["model.init_from=x"]),
    ],
)
def test_what_the_second_begins_with(words: list[str], begins: list[str]) -> None:
    chain = plan(words)
    assert [word for word in chain.finetune if word.startswith("model.init_from=")] == begins
    assert not chain.note


def test_a_recipe_that_begins_elsewhere_is_left_so_and_this_is_said() -> None:
    chain = plan([A, "run_dir=a", "video_llama.demo"])
    assert chain.finetune == ["video_llama.demo"]
    assert "video_llama.demo begins with runs/demo/video_llama_pretrain" in chain.note
    assert "not with a" in chain.note


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([A], "which recipe goes on from what video_llama.debug learns"),
        ([A, B, "vico.debug"], "a chain has two recipes"),
        ([A, A], "both recipes train in runs/debug/video_llama"),
        ([A, "video_mae.debug"], "video_mae.debug has no test"),
        ([A, "video_lama.debug"], "video_llama"),
        ([A, "steps=-1", B], "steps"),
        ([A, B, "stepz=3"], "stepz"),
    ],
)
def test_refused_before_anything_is_submitted(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=message):
        plan(words)
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert not said.out


def test_printed_for_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([A, "run_dir=a b", B, "run_dir=c"]) == 0
    jobs = [job.splitlines() for job in capsys.readouterr().out.split("\n\n")]
    assert jobs[0] == [A, "run_dir=a b"]
    assert [job[0] for job in jobs[1:3]] == [B, B]
    assert jobs[3:] == [[]]
