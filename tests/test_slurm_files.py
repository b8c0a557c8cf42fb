"""The jobs of slurm/: which command they run in their tasks, and what they tell it. Slurm itself is played by scripts;
a real one is the business of another test."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
JOBS = ("pretrain", "finetune", "evaluate")

# A step of tasks: what it says and its status are those that a test wants. A node named `lost` starts nothing.
SRUN = """#!/usr/bin/env bash
[[ " $* " == *" --nodelist=lost "* ]] && exit 1
[[ $1 == --overlap ]] && exit 0
echo "$1" >> tasks
[[ $2 == --kill-on-bad-exit=1 ]] && shift 2
SLURM_STEP_ID=0 "$@"
if [[ -n ${SAYS:-} ]]; then printf '%b\\n' "$SAYS" >&2; fi
exit "${ENDS:-0}"
"""
# The controller: SILENT="requeue=3" lets the first three of such questions fail, with what ERROR says.
CONTROLLER = """#!/usr/bin/env bash
if [[ "$1 $2" == "show hostnames" ]]; then printf 'first\\n%s\\n' "${SECOND:-second}"; exit; fi
what=${0##*/}
[[ $what == squeue ]] || what=$1
echo "$what" >> asked
fails=$(sed -n "s/.*\\b$what=\\([0-9]*\\).*/\\1/p" <<<"${SILENT:-}")
if (($(grep -c "^$what$" asked) <= ${fails:-0})); then
    echo "slurm_load_jobs error: ${ERROR:-Unable to contact slurm controller (connect failure)}" >&2
    exit 1
fi
"""
SCONTROL = """\
if [[ "$1 $2" == "show job" ]]; then
    printf 'JobId=%s JobName=x\\n   Comment=%s \\n   Power=\\n' "$3" "${COMMENT:-}"
    exit
fi
echo "$*" >> calls
"""
SQUEUE = "echo ${STATE-RUNNING}\n"
SLEEP = "#!/usr/bin/env bash\n[[ $1 == 600 ]] || exec /bin/sleep $1\n"
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$@"
env | grep -E '^(MASTER_|OMP_NUM|SRUN_CPUS|NCCL_SOCKET|GLOO_SOCKET)' | sort
"""
PROGRAMS = {
    **{"bin/srun": SRUN, "bin/scontrol": CONTROLLER + SCONTROL, "bin/squeue": CONTROLLER + SQUEUE, "bin/sleep": SLEEP},
    ".venv/bin/python": PYTHON,
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A repository whose Python prints how it was called."""
    (tmp_path / "slurm").symlink_to(REPOSITORY / "slurm")
    for name, content in PROGRAMS.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        file.chmod(0o755)
    return tmp_path


def play(place: Path, job: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A job's script, with Slurm's variables."""
    own = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(place),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "3",
        **variables,
    }
    script = REPOSITORY / "slurm" / f"{job}.sbatch"
    return subprocess.run(
        ["bash", str(script), *arguments], env=own, cwd="/", capture_output=True, text=True, timeout=60
    )


def submit(place: Path, job: str, *arguments: str, **variables: str) -> tuple[list[str], dict[str, str]]:
    """(arguments of Python, variables that it saw) of one task of a job."""
    done = play(place, job, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if re.match(r"[A-Z_]+=", line))
    return lines[:first], dict(line.split("=", 1) for line in lines[first:])


@pytest.mark.parametrize(
    ("job", "arguments", "want"),
    [
        ("pretrain", (), "launch/train.py --deepspeed_config ds_configs/zero2.json --recipe video_llama.pretrain"),
        (
            "pretrain",
            ("video_mae.ssv2_s", "steps=7"),
            "launch/train.py --deepspeed_config ds_configs/zero2.json --recipe video_mae.ssv2_s steps=7",
        ),
        (
            "pretrain",
            ("steps=7",),
            "launch/train.py --deepspeed_config ds_configs/zero2.json --recipe video_llama.pretrain steps=7",
        ),
        ("finetune", (), "launch/train.py --deepspeed_config ds_configs/zero2.json --recipe video_llama.finetune"),
        (
            "evaluate",
            (),
            "launch/evaluate.py --recipe video_llama.finetune --checkpoint runs/video_llama/finetune "
            "run_dir=runs/video_llama/finetune_test",
        ),
        (
            "evaluate",
            ("eval.batch_size=4",),
            "launch/evaluate.py --recipe video_llama.finetune --checkpoint runs/video_llama/finetune "
            "run_dir=runs/video_llama/finetune_test eval.batch_size=4",
        ),
        (
            "evaluate",
            ("video_llama.gebc_opt13b", "run_dir=x"),
            "launch/evaluate.py --recipe video_llama.gebc_opt13b --checkpoint runs/video_llama/gebc_opt13b run_dir=x",
        ),
        (
            "evaluate",
            ("video_llama.finetune", "--untrained", "run_dir=x"),
            "launch/evaluate.py --recipe video_llama.finetune --untrained run_dir=x",
        ),
        (
            "evaluate",
            ("vico.star", "--checkpoint=c"),
            "launch/evaluate.py --recipe vico.star --checkpoint=c",
        ),
        (
            "evaluate",
            ("vico.star", "--checkpoint", "a b"),
            "launch/evaluate.py --recipe vico.star --checkpoint a b",
        ),
    ],
)
def test_what_a_job_runs(place: Path, job: str, arguments: tuple[str, ...], want: str) -> None:
    found, _ = submit(place, job, *arguments)
    assert " ".join(found) == want
    if "a b" in arguments:
        assert "a b" in found, "an argument stays one"


def test_another_file_of_settings(place: Path) -> None:
    for job, script in (("pretrain", "train"), ("evaluate", "evaluate")):
        found, _ = submit(place, job, VLM_DS_CONFIG="ds configs/x.json")
        assert found[:3] == [f"launch/{script}.py", "--deepspeed_config", "ds configs/x.json"]


def test_a_worker_a_core_makes_shards_unless_told_otherwise(place: Path) -> None:
    found, _ = submit(place, "make_shards", "webvid", "--workers", "2")
    assert found == ["tools/make_shards.py", "--workers", "3", "webvid", "--workers", "2"], "the last one counts"


def test_what_tasks_are_told(place: Path) -> None:
    _, seen = submit(place, "pretrain", MASTER_PORT="7")
    assert seen == {"OMP_NUM_THREADS": "3", "SRUN_CPUS_PER_TASK": "3", "MASTER_PORT": "7"}
    _, seen = submit(place, "pretrain", OMP_NUM_THREADS="1")
    assert seen == {"OMP_NUM_THREADS": "1", "SRUN_CPUS_PER_TASK": "3"}, "where they meet is left to them"


@pytest.mark.parametrize(
    ("nodes", "counted", "a_node", "started"),
    [("2", "16", "8", 16), ("3", "16", "8", 24), ("1", "4", "8", 4), ("1", "1", "1", 1), ("3", "1", "1", 3)],
)
def test_a_task_a_gpu_of_the_nodes_that_there_are(
    place: Path, nodes: str, counted: str, a_node: str, started: int
) -> None:
    variables = {"SLURM_JOB_NUM_NODES": nodes, "SLURM_NTASKS": counted, "SLURM_NTASKS_PER_NODE": a_node}
    submit(place, "pretrain", **variables)
    assert (place / "tasks").read_text() == f"--ntasks={started}\n"


TERMINATED = "\\nsrun: error: node2: task 1: Terminated"
ENDINGS = {
    "saved": ({"ENDS": "85"}, 85, "stopped by a signal, and saved", ""),
    "saved, and the others were ended": (
        {"ENDS": "143", "SAYS": f"srun: error: node1: tasks 0-1: Exited with exit code 85{TERMINATED}"},
        *(85, "stopped by a signal, and saved", ""),
    ),
    "saved, after many failures": ({"ENDS": "85", "COMMENT": "failures:10"}, 85, "stopped by a signal, and saved", ""),
    "hung": (
        {"ENDS": "137", "SAYS": "srun: error: a: task 1: Exited with exit code 86\\nsrun: error: b: task 0: Killed"},
        *(86, "the run hung (1 of 10)", "failures:1"),
    ),
    "hung, one was killed before": (
        {"ENDS": "137", "SAYS": "srun: error: b: task 0: Killed\\nsrun: error: a: task 1: Exited with exit code 86"},
        *(86, "the run hung (1 of 10)", "failures:1"),
    ),
    "hung again": ({"ENDS": "86", "COMMENT": "my own failures:9"}, 86, "the run hung (10 of 10)", "my own failures:10"),
    "hung too often": ({"ENDS": "86", "COMMENT": "failures:10"}, 86, None, ""),
    "hung, after a day": (
        {"ENDS": "86", "COMMENT": "my own failures:10", "SECONDS": "86400"},
        *(86, "the run hung (1 of 10)", "my own failures:1"),
    ),
    "hung, which may not be": ({"ENDS": "86", "VLM_MAX_REQUEUES": "0"}, 86, None, ""),
    "signal while it loads": ({"ENDS": "138"}, 138, "ended by a signal (1 of 10)", "failures:1"),
    "preempted while it loads": (
        {"ENDS": "143", "SAYS": "srun: error: a: task 0: Terminated"},
        *(143, "ended by a signal (1 of 10)", "failures:1"),
    ),
    "a node is lost": (
        {"ENDS": "143", "SECOND": "lost", "SAYS": f"srun: error: a: task 0: Exited with exit code 1{TERMINATED}"},
        *(1, "lost lost (1 of 10)", "failures:1"),
    ),
    "an error": (
        {"ENDS": "143", "SAYS": f"srun: error: a: task 0: Exited with exit code 1{TERMINATED}"},
        *(1, None, ""),
    ),
    "the user's error": (
        {"ENDS": "143", "SECOND": "lost", "SAYS": f"srun: error: a: task 0: Exited with exit code 2{TERMINATED}"},
        *(2, None, ""),
    ),
    "numbers": ({"ENDS": "3", "SECOND": "lost"}, 3, None, ""),
    "killed for its memory": (
        {"ENDS": "143", "SAYS": f"srun: error: b: task 1: Out Of Memory{TERMINATED}"},
        *(137, "a task was killed (1 of 10)", "failures:1"),
    ),
    "a crash": (
        {"ENDS": "143", "SAYS": f"srun: error: b: task 1: Segmentation fault (core dumped){TERMINATED}"},
        *(137, "a task was killed (1 of 10)", "failures:1"),
    ),
    "a crash of a command alone": ({"ENDS": "139"}, 139, "a task was killed (1 of 10)", "failures:1"),
    "an error before others were killed": (
        {
            "ENDS": "137",
            "SAYS": "srun: error: a: task 0: Exited with exit code 1\\nsrun: error: b: task 1: Killed",
        },
        *(1, None, ""),
    ),
    "cancelled": ({"ENDS": "85", "STATE": "COMPLETING"}, 85, None, ""),
    "cancelled while it loads": ({"ENDS": "143", "STATE": ""}, 143, None, ""),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_follows_from_an_ending(place: Path, ending: str) -> None:
    variables, status, queued, comment = ENDINGS[ending]
    done = play(place, "pretrain", **variables)
    assert done.returncode == status
    calls = (place / "calls").read_text().splitlines() if (place / "calls").exists() else []
    assert calls == [
        *([f"update JobId=42 Comment={comment}"] if comment else []),
        *(["requeue 42"] if queued else []),
    ]
    if queued:
        assert f"slurm: {queued}: job 42 is queued again and goes on from its last checkpoint" in done.stdout
    assert variables.get("SAYS", "").replace("\\n", "\n") in done.stderr, "what tasks say is in the job's log"


HUNG = {"ENDS": "86", "COMMENT": "my own failures:3"}
SILENCES = {
    "for a moment, each time": (
        {**HUNG, "SILENT": "squeue=3 show=2 update=1 requeue=2"},
        *({"squeue": 4, "show": 3, "update": 2, "requeue": 3}, "my own failures:4", True, "the run hung (4 of 10)"),
    ),
    "when asked for the comment": (
        {**HUNG, "SILENT": "show=99"},
        *({"squeue": 1, "show": 24, "requeue": 1}, None, True, "what counts is how often the job has begun again"),
    ),
    "when told the comment": (
        {**HUNG, "SILENT": "update=99"},
        *(
            {"squeue": 1, "show": 1, "update": 24, "requeue": 1},
            None,
            True,
            "what counts is how often the job has begun again",
        ),
    ),
    "when asked for the state, and it saved": (
        {"ENDS": "85", "SILENT": "squeue=99"},
        *({"squeue": 24, "requeue": 1}, None, True, "stopped by a signal, and saved"),
    ),
    "when asked for the state, and it hung": (
        {**HUNG, "SILENT": "squeue=99"},
        *({"squeue": 24, "show": 1, "update": 1, "requeue": 1}, "my own failures:4", True, "the run hung (4 of 10)"),
    ),
    "when asked for the state, and it was killed": (
        {"ENDS": "137", "SILENT": "squeue=99"},
        *({"squeue": 24}, None, False, ""),
    ),
    "to the end": (
        {"ENDS": "85", "SILENT": "squeue=99 requeue=99"},
        *({"squeue": 24, "requeue": 24}, None, False, "the requeue did not succeed"),
    ),
    "no, the job is forgotten": (
        {"ENDS": "85", "SILENT": "squeue=99", "ERROR": "Invalid job id specified"},
        *({"squeue": 1}, None, False, ""),
    ),
    "no, the comment is not yours": (
        {**HUNG, "SILENT": "update=99", "ERROR": "Access/permission denied"},
        *(
            {"squeue": 1, "show": 1, "update": 1, "requeue": 1},
            None,
            True,
            "what counts is how often the job has begun again",
        ),
    ),
    "no, the comment is not yours, and it has begun again often": (
        {**HUNG, "SILENT": "update=99", "ERROR": "Access/permission denied", "SLURM_RESTART_COUNT": "10"},
        *(
            {"squeue": 1, "show": 1, "update": 1},
            None,
            False,
            "after 10 starts (VLM_MAX_REQUEUES=10): not queued again",
        ),
    ),
    "no requeue": (
        {"ENDS": "85", "SILENT": "requeue=99", "ERROR": "Requested operation is presently disabled"},
        *({"squeue": 1, "requeue": 1}, None, False, "the requeue did not succeed"),
    ),
}


@pytest.mark.parametrize("silence", SILENCES)
def test_a_controller_that_does_not_answer(place: Path, silence: str) -> None:
    variables, asked, comment, queued, said = SILENCES[silence]
    done = play(place, "pretrain", VLM_SLURM_RETRY_SECONDS="0", **variables)
    assert done.returncode == int(variables["ENDS"])
    assert Counter((place / "asked").read_text().split()) == asked
    calls = (place / "calls").read_text().splitlines() if (place / "calls").exists() else []
    assert calls == [
        *([f"update JobId=42 Comment={comment}"] if comment else []),
        *(["requeue 42"] if queued else []),
    ]
    assert said in done.stdout
    lines = ["slurm: no answer, asked again for two minutes: s", "slurm: still no answer, given up: s"]
    want = [0, 0] if "ERROR" in variables else [variables["SILENT"].count(sign) for sign in ("=", "=99")]
    assert [done.stderr.count(line) for line in lines] == want, "a line each"


def test_a_task_of_an_array_is_queued_again_alone(place: Path) -> None:
    """The number of the array's last task is that of the array: squeue and scontrol would take it for all tasks."""
    (place / ".venv/bin/python").write_text("#!/usr/bin/env bash\nkill -USR1 $$\n")
    (place / "bin/squeue").write_text("#!/usr/bin/env bash\necho RUNNING\n[[ $* == *42_3* ]] || echo RUNNING\n")
    done = play(place, "make_shards", SLURM_ARRAY_JOB_ID="42", SLURM_ARRAY_TASK_ID="3")
    assert done.returncode == 138
    assert (place / "calls").read_text() == "update JobId=42_3 Comment=failures:1\nrequeue 42_3\n"
    assert "slurm: ended by a signal (1 of 10): job 42_3 is queued again" in done.stdout


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_signal_to_the_job_reaches_the_run_as_sigusr1(place: Path, name: str) -> None:
    listens = (
        "#!/usr/bin/env bash\ntrap 'echo saved; exit 85' USR1\nkill -{} $PPID\nfor _ in {{1..99}}; do sleep 0.1; done"
    )
    (place / ".venv/bin/python").write_text(listens.format(name))
    (place / "bin/srun").write_text('#!/usr/bin/env bash\nshift 2\nexec "$@"\n')  # srun passes SIGUSR1 to its tasks
    done = play(place, "pretrain")
    assert (done.returncode, done.stdout.splitlines()[:2]) == (85, ["slurm: told to stop", "saved"])
    assert (place / "calls").read_text() == "requeue 42\n"


def program(place: Path, name: str, content: str) -> None:
    """Another script for a program; in it BATCH is the process of the job's own shell."""
    (place / name).write_text(f"#!/usr/bin/env bash\n{content}\n")
    (place / name).chmod(0o755)
    (place / "first").write_text("export BATCH=${BATCH:-$$}\n")  # the job's shell is the first to read it (BASH_ENV)


def test_a_signal_before_the_run_is_known_is_passed_on(place: Path) -> None:
    program(place, "bin/mktemp", 'kill -USR1 "$BATCH"\nexec /usr/bin/mktemp')
    program(place, "bin/srun", 'shift 2\nexec "$@"')
    program(
        *(place, ".venv/bin/python"),
        "trap 'echo saved; exit 85' USR1\ntouch ready\nfor _ in {1..99}; do sleep 0.1; done",
    )
    waits = "until [[ $1 == 600 || -e ready ]]; do /bin/sleep 0.05; done"  # as long as the run needs to listen
    program(place, "bin/sleep", f"{waits}\n[[ $1 == 600 ]] || exec /bin/sleep $1")
    done = play(place, "pretrain", BASH_ENV=str(place / "first"))
    assert (done.returncode, done.stdout.splitlines()[:2]) == (85, ["slurm: told to stop", "saved"])
    assert (place / "calls").read_text() == "requeue 42\n"


def test_a_second_signal_does_not_end_the_shell_before_the_requeue_but_after_it(place: Path) -> None:
    program(place, "bin/squeue", 'kill -USR1 "$BATCH"\nkill -TERM "$BATCH"\necho RUNNING')
    after = 'kill -TERM "$BATCH" $$\necho "not ended" >> calls'
    program(place, "bin/sleep", f"[[ $1 == 600 ]] || exec /bin/sleep $1\n{after}")
    done = play(place, "pretrain", BASH_ENV=str(place / "first"), ENDS="85")
    assert (place / "calls").read_text() == "requeue 42\n"
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("job", JOBS)
def test_a_task_a_gpu_and_nothing_lost_in_a_requeue(job: str) -> None:
    lines = (REPOSITORY / "slurm" / f"{job}.sbatch").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert options["gres"] == f"gpu:{options['ntasks-per-node']}"
    assert {"requeue", "open-mode"} <= options.keys()
    assert options["signal"] == "B:USR1@120", "told ahead of the time limit, the job's shell alone"
    assert len(lines) < 32, "thin: what jobs share is in env.sh"


SBATCH = """#!/usr/bin/env bash
printf '%s|' "$@" >> calls
echo >> calls
[[ " $* " == *"/$REFUSES.sbatch "* ]] && exit 1
echo "$(wc -l < calls);cluster"
"""


def chain(place: Path, *arguments: str, refuses: str = "none") -> subprocess.CompletedProcess[str]:
    """slurm/chain.sh; the plan, an sbatch that may refuse a job, and scancel are scripts."""
    plan = "#!/usr/bin/env bash\necho \"$*\" > asked\nprintf 'A\\nrun_dir=a b\\n\\nB\\n\\nB\\n--checkpoint=c\\n\\n'\n"
    scancel = '#!/usr/bin/env bash\necho "scancel $*" >> calls\n'
    for name, content in ((".venv/bin/python", plan), ("bin/sbatch", SBATCH), ("bin/scancel", scancel)):
        (place / name).write_text(content)
        (place / name).chmod(0o755)
    variables = {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "REFUSES": refuses}
    command = ["bash", str(place / "slurm" / "chain.sh"), *arguments]
    return subprocess.run(command, env=variables, cwd="/", capture_output=True, text=True, timeout=60)


def test_a_chain_of_three_jobs(place: Path) -> None:
    done = chain(place, "--nodes=2", "--partition=x", "A", "run_dir=a b", "B")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "pretrain 1\nfinetune 2\nevaluate 3\n"
    assert (place / "asked").read_text() == "-m vlm.run.chain A run_dir=a b B\n"
    after = "--parsable|--nodes=2|--partition=x|--dependency=afterok:{}|--kill-on-invalid-dep=yes|"
    assert (place / "calls").read_text().splitlines() == [
        "--parsable|--nodes=2|--partition=x|slurm/pretrain.sbatch|A|run_dir=a b|",
        f"{after.format(1)}slurm/finetune.sbatch|B|",
        f"{after.format(2)}slurm/evaluate.sbatch|B|--checkpoint=c|",
    ]


def test_a_chain_says_what_it_takes(place: Path) -> None:
    done = chain(place, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Pretraining, fine-tuning")
    assert "slurm/chain.sh [OPTION …] [RECIPE_A [key=value …]] [RECIPE_B [key=value …]]" in done.stdout
    assert "set -euo" not in done.stdout
    assert not (place / "calls").exists(), "nothing is submitted"


def test_of_a_chain_that_is_not_accepted_nothing_is_left(place: Path) -> None:
    done = chain(place, refuses="evaluate")
    assert done.returncode == 1
    assert "sbatch did not accept slurm/evaluate.sbatch; no job of the chain is left" in done.stderr
    assert (place / "calls").read_text().splitlines()[-1] == "scancel 1 2"
