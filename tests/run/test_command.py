"""The command line tells what it will do before it does it."""

import json
import os
import subprocess
import sys
import time
import warnings

import pytest
from launching import ROOT

from vlm.errors import HUNG, DamagedMemory, NoRendezvous, Stuck
from vlm.recipe import families
from vlm.run import command
from vlm.run.command import evaluate_main, place, train_main
from vlm.types import UserError

CPU = str(ROOT / "ds_configs" / "cpu.json")
DEMO = ["--recipe", "vit_llama.demo", "--deepspeed_config", CPU]


def test_dry_run_prints_recipe_and_derived_dict(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["--deepspeed_config", CPU, "--recipe", "vit_llama.demo", "--dry-run", "global_batch_size=48"]
    assert train_main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["config"]["global_batch_size"] == 48
    assert plan["deepspeed"]["train_batch_size"] == 48
    assert plan["deepspeed"]["train_micro_batch_size_per_gpu"] == 24


@pytest.mark.parametrize("main", [train_main, evaluate_main])
def test_help_fits_a_screen_and_names_recipes(main, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    page = "\n".join(lines)
    for part in ("vit_llama.demo", "examples:", "--dry-run", *(f"{module} (" for module in families())):
        assert part in page


def test_dry_run_of_an_evaluation_runs_nothing(capsys, tmp_path):
    arguments = ["--recipe", "vit_llama.demo", "--checkpoint", "DIR", "--dry-run", f"run_dir={tmp_path / 'x'}"]
    assert evaluate_main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["recipe"], plan["checkpoint"]) == ("vit_llama.demo", "DIR")
    assert plan["config"]["run_dir"] == str(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_needs_nothing_that_training_began_with(capsys, tmp_path):
    gone = [f"eval.shards={tmp_path / 'none'}", "model.projection_from=gone.pth"]
    assert evaluate_main(["--recipe", "video_llama.debug", "--checkpoint", str(tmp_path), "--dry-run", *gone]) == 0
    model = json.loads(capsys.readouterr().out)["config"]["model"]
    assert (model["init_from"], model["projection_from"]) == (None, None)
    assert evaluate_main(["--recipe", "video_llama.debug", "--untrained", gone[1]]) == 2
    assert "model.projection_from=gone.pth" in capsys.readouterr().err


def test_help_all_lists_every_field_with_its_meaning(capsys):
    assert train_main(["--recipe", "vit_llama.ssv2_s_llama", "--help-all"]) == 0
    page = capsys.readouterr().out
    for path in ("model.llama.layer = 15", "inputs.randaugment", "optim.layer_decay = 0.7", "checkpoint_every"):
        assert path in page
    assert "Peak learning rate" in page


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--recipe", "vit_llama.demo"], "--deepspeed_config"),
        (["--recipe", "vit_llama.dmo", "--deepspeed_config", CPU], "vit_llama.demo"),
        (["--recipe", "vit_llama.demo", "--deepspeed_config", CPU, "stepz=1"], "'steps'"),
        (["--recipe", "vit_llama.demo", "--deepspeed_config", "none.json"], "none.json"),
        (["--recipe", "vamos", "--deepspeed_config", CPU], "vamos.nextqa_cap"),
        (["--help-all"], "add --recipe"),
        (["--help-all"], "vico.tvqa"),
        (["--recipe"], "expected one argument"),
        (["--recipe", "vit_llama.demo", "--dryrun"], "did you mean --dry-run?"),
        (["--recipe", "vit_llama.demo", "--stepz=3"], "without dashes: stepz=3"),
        (["--recipe", "vit_llama.demo", "--steps", "3"], "without dashes: steps=VALUE"),
        ([*DEMO, "model.num_frames=16"], "model.num_frames is 16, but inputs.num_frames is 8"),
        ([*DEMO, "--dry-run", "inputs.num_classes=9"], "model.num_classes is 8, but inputs.num_classes is 9"),
        ([*DEMO, "--dry-run", "eval.probes=one_fram"], "did you mean 'one_frame'?"),
        ([*DEMO, "data.shards=nowhere"], "data.shards=nowhere: there is no such folder"),
        ([*DEMO, "model.llama.path=nowhere"], "model.llama.path=nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, part, capsys):
    assert train_main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert part in error
    assert len(error.strip().splitlines()) == 1


def test_evaluate_needs_a_checkpoint_and_a_test(capsys):
    assert evaluate_main(["--recipe", "vit_llama.debug", "--checkpoint", "nowhere"]) == 2
    assert "--checkpoint nowhere" in capsys.readouterr().err
    assert evaluate_main(["--recipe", "video_mae.debug", "--untrained"]) == 2
    assert "has no test" in capsys.readouterr().err
    assert evaluate_main(["--recipe", "vit_llama.debug"]) == 2
    assert "--checkpoint" in capsys.readouterr().err


def test_no_recipe_shows_help(capsys):
    assert train_main([]) == 2
    assert "recipes:" in capsys.readouterr().out


def test_a_nested_mistake_in_the_json_is_told_by_the_dry_run(capsys, tmp_path):
    path = tmp_path / "hardware.json"
    path.write_text('{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"reduce_buckt_size": 5}}')
    assert train_main(["--recipe", "vit_llama.demo", "--deepspeed_config", str(path), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: zero_optimization.reduce_buckt_size")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--recipe", "vit_llama.dmo"], [*DEMO[:3], "nowhere.json"], [*DEMO, "data.shards=nowhere"]],
)
def test_a_wrong_name_is_told_before_anything_heavy_is_imported(arguments):
    code = "import sys; from vlm.run.command import train_main; train_main(sys.argv[1:]); "
    code += "sys.exit(bool({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False).returncode == 0


def raising(error):
    def job(options, at_exit):
        raise error

    return job


@pytest.mark.parametrize("kind", [NoRendezvous, Stuck])
def test_what_another_start_may_mend_asks_for_one(kind, monkeypatch, capsys):
    monkeypatch.setattr(command, "_train", raising(kind("rank 1 did not come")))
    assert train_main(["--recipe", "vit_llama.demo"]) == HUNG
    assert capsys.readouterr().err == "error: rank 1 did not come\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DamagedMemory("inf"), HUNG),
        (FloatingPointError("the budget is spent"), 3),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA`"), HUNG),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), 1),  # a program's mistake too
        (RuntimeError("NCCL error: remote process exited or there was a network error"), 1),  # another rank's end
        (ValueError("CUDA error: uncorrectable ECC error encountered"), 1),
    ],
)
def test_a_machine_that_fails_asks_for_another_start(error, status, monkeypatch, capsys):
    monkeypatch.setattr(command, "_train", raising(error))
    assert train_main(["--recipe", "vit_llama.demo"]) == status
    assert str(error).splitlines()[0] in capsys.readouterr().err


def test_an_error_of_all_processes_is_told_once(monkeypatch, capsys):
    """Rank 0 at once; another only where nobody ended it, and then by its rank; each in one write."""
    arguments = ["--recipe", "vit_llama.demo"]
    monkeypatch.setattr(command, "_train", raising(UserError("wrong")))
    monkeypatch.setattr(command, "GRACE_SECONDS", 0.05)
    assert train_main(arguments) == 2
    assert capsys.readouterr().err == "error: wrong\n"
    monkeypatch.setenv("RANK", "1")
    started = time.monotonic()
    assert train_main(arguments) == 2
    assert time.monotonic() - started >= 0.05
    assert capsys.readouterr().err == "rank 1: error: wrong\n"


def test_a_full_disk_is_one_line_but_a_lost_connection_is_a_traceback(monkeypatch, capsys):
    arguments = ["--recipe", "vit_llama.demo"]
    monkeypatch.setattr(command, "_train", raising(OSError(28, "No space left on device", "runs/x")))
    assert train_main(arguments) == 2
    assert capsys.readouterr().err == "error: runs/x: No space left on device\n"
    monkeypatch.setattr(command, "_train", raising(ConnectionResetError("peer")))
    assert train_main(arguments) == 1
    assert "Traceback" in (told := capsys.readouterr().err)
    assert told.endswith("ConnectionResetError: peer\n")


def test_what_nobody_foresaw_is_told_before_the_process_group_is_left(monkeypatch, capsys):
    told = []

    def job(options, at_exit):
        at_exit.callback(lambda: told.append(capsys.readouterr().err))
        raise RuntimeError("boom")

    monkeypatch.setattr(command, "_train", job)
    assert train_main(["--recipe", "vit_llama.demo"]) == 1
    assert "RuntimeError: boom" in told[0]
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, (3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"WORLD_SIZE": "8"}, (0, 8)),
    ],
)
def test_place_by_each_launcher(variables, expected, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI"))]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place() == expected


def test_our_warnings_are_plain_sentences(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert train_main(["--help"]) == 0
    ours = str(ROOT / "vlm" / "models" / "vit_llama.py")
    assert warnings.formatwarning("random weights", UserWarning, ours, 3) == "warning: random weights\n"
    assert "UserWarning: odd" in warnings.formatwarning("odd", UserWarning, "/lib/other.py", 3)
