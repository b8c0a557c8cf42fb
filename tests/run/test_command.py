"""The command line tells what it will do before it does it."""

import json

import pytest
from launching import ROOT

from vlm.run.command import evaluate_main, train_main

CPU = str(ROOT / "ds_configs" / "cpu.json")


def test_dry_run_prints_recipe_and_derived_dict(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["--deepspeed_config", CPU, "--recipe", "vit_llama.demo", "--dry-run", "global_batch_size=48"]
    assert train_main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["config"]["global_batch_size"] == 48
    assert plan["deepspeed"]["train_batch_size"] == 48
    assert plan["deepspeed"]["train_micro_batch_size_per_gpu"] == 24


@pytest.mark.parametrize("main", [train_main, evaluate_main])
def test_help_fits_a_screen_and_names_recipes(main, capsys):
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert len(page.splitlines()) <= 40
    assert "vit_llama.demo" in page
    assert "example" in page


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
    ],
)
def test_mistakes_are_one_line(arguments, part, capsys):
    assert train_main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert part in error
    assert len(error.strip().splitlines()) == 1


def test_evaluate_needs_a_checkpoint_and_a_test(capsys):
    assert evaluate_main(["--recipe", "vit_llama.debug"]) == 2
    assert "--checkpoint" in capsys.readouterr().err


def test_no_recipe_shows_help(capsys):
    assert train_main([]) == 2
    assert "recipes:" in capsys.readouterr().out
