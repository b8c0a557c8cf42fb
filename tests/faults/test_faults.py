"""Faults of random kinds at random moments, each survived; and the harness itself: it finds what does not hold."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults import jobs, ledger, points, report
from tests.faults.courses import Course, loaded_of
from tests.faults.harness import KINDS, Setting, Trial, Workshop, load_kinds
from tests.faults.jobs import ROOT
from tests.faults.ledger import Row

IN_CI = 15


@pytest.mark.slow
def test_random_faults_are_survived(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`VLM_SEED=N` repeats a series; the seed is printed, also where all is well."""
    seed = int(os.environ.get("VLM_SEED", time.time_ns() % 10**6))
    with capfd.disabled():
        print(f"\n{IN_CI} random faults, VLM_SEED={seed}", flush=True)
    command = [sys.executable, "-m", "tests.faults", "--number", str(IN_CI), "--seed", str(seed)]
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [*command, "--json", str(out), "--ledger", str(tmp_path / "ledger.jsonl")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    rows = json.loads(out.read_text()) if out.is_file() else []
    assert len(rows) == IN_CI, done.stdout + done.stderr
    assert {(row["kind"], row["seed"]) for row in rows} == set(ledger.series(list(load_kinds()), seed, IN_CI))
    lost = [row for row in rows if not row["survived"]]
    assert not lost, f"VLM_SEED={seed}: {lost}"
    assert done.returncode == 0


def test_there_are_at_least_24_kinds_and_each_says_what_it_does() -> None:
    kinds = load_kinds()
    assert len(kinds) >= 24
    for one in kinds.values():
        assert len(one.what) > 10, one.name
        assert len(one.checked) > 10, one.name


def test_only_trials_of_this_very_tree_are_known(tmp_path: Path) -> None:
    file, commit = tmp_path / "ledger.jsonl", "0123456789" * 4
    for number, name in enumerate((commit, f"{commit}+changes", "unknown")):
        ledger.write(Row("kill_fsync", number, True, "", name, 1.0), file)
    assert list(ledger.known(commit, file)) == [("kill_fsync", 0)]
    assert not ledger.known(f"{commit}+changes", file)
    assert not ledger.known("unknown", file)


def test_a_series_takes_all_kinds_in_turn_and_begins_the_same() -> None:
    names = [f"kind{number}" for number in range(7)]
    long, short = list(ledger.series(names, 5, 30)), list(ledger.series(names, 5, 11))
    assert long[:11] == short
    assert len(set(long)) == 30
    for turn in range(4):
        assert {kind for kind, _ in long[7 * turn : 7 * turn + 7]} == set(names)
    assert list(ledger.series(names, 6, 30)) != long


def test_rows_are_appended_and_read_back(tmp_path: Path) -> None:
    rows = [Row("kill", 3, True, "", "abc", 1.5), Row("kill", 4, False, "step 2 …", "abc", 0.1)]
    for row in rows:
        ledger.write(row, tmp_path / "ledger.jsonl")
    assert ledger.read(tmp_path / "ledger.jsonl") == rows
    assert ledger.read(tmp_path / "none") == []


def test_rows_that_are_appended_do_not_make_another_commit(tmp_path: Path) -> None:
    """Else a series that was cut short would begin anew: the ledger is in the repository."""

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@t.invalid")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    for name in ("tests/faults/ledger.jsonl", "docs/reliability.md", "code.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = ledger.commit_of_trials(tmp_path)
    assert len(clean) == 40
    (tmp_path / "tests/faults/ledger.jsonl").write_text("first\nsecond\n")
    (tmp_path / "docs/reliability.md").write_text("other\n")
    assert ledger.commit_of_trials(tmp_path) == clean
    (tmp_path / "code.py").write_text("other\n")
    assert ledger.commit_of_trials(tmp_path) == clean + "+changes"


def test_the_page_is_made_of_the_ledger() -> None:
    assert report.PAGE.read_text() == report.page(ledger.read(), load_kinds()), "run python -m tests.faults.report"


def test_the_page_tells_what_was_lost() -> None:
    kinds = {name: KINDS[name] for name in ("kill_rename", "torn_write") if load_kinds()}
    rows = [Row("kill_rename", 3, True, "", "abc", 1.5), Row("torn_write", 4, False, "latest is not the last", "a", 1)]
    text = report.page(rows, kinds)
    assert "1 of 2 trials of 2 kinds" in text
    assert "| `kill_rename` | 1 | 1 |" in text
    assert "- `torn_write` seed 4, commit a: latest is not the last" in text
    text = report.page([*rows, Row("torn_write", 4, True, "", "b", 1)], kinds)
    assert "2 of 2 trials of 2 kinds of faults survived, 1 of them once what they had found was mended" in text
    assert "- `torn_write` seed 4, commit a: latest is not the last. Survives at b." in text


def test_a_fault_strikes_before_within_and_after_a_call() -> None:
    """In `points`' own way: by name, at the call that is due, at the line that was drawn."""
    for when, expected in (
        ("before", ["strike"]),
        ("during", ["began", "strike"]),
        ("after", ["began", "ended", "strike"]),
    ):
        seen: list[str] = []

        class Struck(Exception):
            pass

        def act(seen: list[str] = seen) -> None:
            seen.append("strike")
            raise Struck

        module = type(sys)("vlm_points_test")

        def work(seen: list[str] = seen) -> None:
            seen.append("began")
            seen.append("ended")

        module.work = work  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        try:
            points.strike_at("vlm_points", "work", when, 2, points.Countdown(0, 2).due, act)
            module.work()  # type: ignore[attr-defined]
            assert seen == ["began", "ended"]
            seen.clear()
            with pytest.raises(Struck):
                module.work()  # type: ignore[attr-defined]
        finally:
            del sys.modules[module.__name__]
        assert seen == expected, when


def test_a_name_that_is_gone_is_told() -> None:
    with pytest.raises(AssertionError, match="no_such_function"):
        points.replace("vlm.run.checkpoint", "no_such_function", lambda function: function)


def _course(steps: int = 4) -> Course:
    import torch

    rows = [
        {"step": step, "batch_digest": f"d{step}", "epoch": 0, "lr": 0.1, "quarantined": 0, "loss": 2.0 / step}
        for step in range(1, steps + 1)
    ]
    loaded = {step: [f"a{step}", f"b{step}"] for step in range(steps)}
    return Course({"w": torch.arange(3.0)}, {"exp_avg/w": torch.ones(3)}, {}, rows, loaded)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda course: course.rows.pop(2), "steps"),
        (lambda course: course.rows.insert(2, course.rows[1]), "steps"),
        (lambda course: course.rows[1].update(batch_digest="x"), "batch_digest differs"),
        (lambda course: course.loaded[2].reverse(), "other samples"),
        (lambda course: course.loaded[2].append("a2"), "other samples"),
        (lambda course: course.rows[3].update(loss=0.5000001), "losses differ"),
        (lambda course: course.weights["w"].add_(1e-7), "weight w differs"),
        (lambda course: course.moments["exp_avg/w"].mul_(1.0000001), "moment exp_avg/w differs"),
    ],
)
def test_whatever_differs_is_found(spoil, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    have, trial = _course(), Trial(Workshop(tmp_path), "kill", 0, tmp_path)
    monkeypatch.setattr(Trial, "course", lambda self: have)
    monkeypatch.setattr(Trial, "check_checkpoints", lambda self, damaged=(): ["step-00000004"])
    trial.checkpoints.mkdir(parents=True)
    (trial.checkpoints / "latest").write_text("step-00000004\n")
    trial.compare(_course())
    (trial.checkpoints / ".step-00000006.tmp").mkdir()
    with pytest.raises(AssertionError, match="left behind"):
        trial.compare(_course())
    (trial.checkpoints / ".step-00000006.tmp").rmdir()
    spoil(have)
    with pytest.raises(AssertionError, match=said):
        trial.compare(_course())


def test_the_last_attempt_at_a_step_counts_and_all_its_ranks(tmp_path: Path) -> None:
    rows = [
        *({"attempt": 1, "step": 0, "world": 2, "rank": rank, "keys": [f"first{rank}"]} for rank in (1, 0)),
        *({"attempt": 1, "step": 1, "world": 2, "rank": rank, "keys": [f"lost{rank}"]} for rank in (0,)),
        {"attempt": 2, "step": 1, "world": 1, "rank": 0, "keys": ["again0", "again1"]},
    ]
    path = tmp_path / "loaded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert loaded_of(path) == {0: ["first0", "first1"], 1: ["again0", "again1"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    with pytest.raises(AssertionError, match="only ranks"):
        loaded_of(path)


def test_a_trial_is_drawn_by_its_seed_alone(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    one, same, other = (Trial(workshop, "kill", seed, tmp_path) for seed in (1, 1, 2))
    drawn = [[trial.draw() for _ in range(5)] for trial in (one, same, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {setting.steps for setting in drawn[0]} == {Setting().steps}


def test_a_job_that_does_not_end_is_ended(tmp_path: Path) -> None:
    job = jobs.launch(
        [sys.executable, "-c", "import time; print('waits', flush=True); time.sleep(60)"], tmp_path / "out"
    )
    while "waits" not in job.printed():
        time.sleep(0.01)
    with pytest.raises(AssertionError, match="has not ended after 0 s: waits"):
        job.wait(limit=0.1)
    assert job.poll()


def test_one_bit_is_flipped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    place = points.flip(path, random.Random(3))
    content = path.read_bytes()
    assert [number for number, byte in enumerate(content) if byte] == [place]
    assert content[place].bit_count() == 1


def test_a_detail_names_no_place_of_this_machine(tmp_path: Path) -> None:
    text = f"{tmp_path}/trial/run and {ledger.ROOT}/vlm/x.py and {pytest.__file__}"
    assert ledger.without_places(text, tmp_path) == "trial/run and vlm/x.py and pytest/__init__.py"
    assert not [row for row in ledger.read() if str(ledger.ROOT) in row.detail]
