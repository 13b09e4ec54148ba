"""The entry point as a process: exit codes, which rank prints, and that looking leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pretrain_gpt
from parallel.rendezvous import RendezvousError
from runtime.errors import ConfigError

ENTRY = Path(pretrain_gpt.__file__)


def start(folder, *words, **environment):
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")}
    command = [sys.executable, str(ENTRY), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**kept, **environment})
    assert list(folder.iterdir()) == []
    return done


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.num_layer=3"], "error: unknown key model.num_layer=3; did you mean model.num_layers=3?\n"),
        (["name=a/b", "parallel.cp=2"], "error: parallel.cp=2 is not available"),
        (["--cfg", "all"], "error: --cfg all: only `--cfg job`"),
        (["world_size=2"], "error: world_size=2, but one process was started: use `torchrun --standalone"),
        (["-m", "seed=1,x"], "error: seed=x: expected an integer\n"),
        (["data.path=nowhere"], "error: no prepared data at nowhere"),
    ],
)
def test_a_wrong_configuration_exits_78_with_one_message(tmp_path, words, message):
    done = start(tmp_path, *words)
    assert done.returncode == 78
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_every_rank_exits_78_and_only_the_first_speaks(tmp_path):
    assert "unknown key tp" in start(tmp_path, "tp=2", RANK="0", WORLD_SIZE="2").stderr
    second = start(tmp_path, "tp=2", RANK="1", WORLD_SIZE="2")
    assert (second.returncode, second.stderr, second.stdout) == (78, "", "")


@pytest.mark.parametrize(
    ("variable", "value"), [("RANK", "x"), ("RANK", "2"), ("LOCAL_RANK", "-1"), ("MASTER_PORT", "abc")]
)
def test_a_launcher_that_says_nonsense_is_refused(tmp_path, variable, value):
    said = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = start(tmp_path, "model=tiny", **said | {variable: value})
    assert done.returncode == 78
    if variable != "RANK":  # else no rank is the first, which speaks
        assert f"error: the environment says {variable}={value}, which is no number" in done.stderr


BATCH = ["train.global_batch_size=24", "data.seq_length=256"]


def test_check_says_how_the_work_is_divided(tmp_path):
    done = start(tmp_path, "check=true", "world_size=6", "parallel.dp_replicate=2", *BATCH)
    assert done.returncode == 0, done.stderr
    assert "OK: run is legal on 6 ranks" in done.stdout
    assert "dp_replicate 2 * dp_shard 3 = 6" in done.stdout
    assert "24 samples a step: 6 ranks * micro-batch 4 * 1 accumulated" in done.stdout
    assert "6,144 a step" in done.stdout
    assert "vocabulary  1,536" in done.stdout


def test_a_reader_who_leaves_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-u", str(ENTRY), "check=true"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_and_the_composed_configuration_are_shown(tmp_path):
    assert start(tmp_path, "--help", "tp=2").stdout.startswith("Trains a GPT.")
    shown = start(tmp_path, "--cfg", "job", "train.steps=7")
    assert shown.returncode == 0
    assert "train:\n  steps: 7\n" in shown.stdout


def test_a_sweep_starts_every_run_and_keeps_the_first_failure(tmp_path, monkeypatch, capsys):
    started = []

    def run(command, check):
        started.append(command)
        return subprocess.CompletedProcess(command, returncode=len(started) - 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert pretrain_gpt.main(["-m", "seed=1,2,3"], {}) == 1
    assert [command[1:] for command in started] == [
        [str(ENTRY), f"seed={seed}", f"name='run-seed={seed}'"] for seed in (1, 2, 3)
    ]
    assert "run 3/3: seed=3" in capsys.readouterr().out


def test_a_sweep_really_runs(tmp_path):
    done = start(tmp_path, "-m", "seed=1,2", "check=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("OK: run-seed=") == 2


@pytest.mark.parametrize("environment", [{"TORCHELASTIC_RUN_ID": "x"}, {"WORLD_SIZE": "2"}])
def test_a_sweep_is_refused_under_torchrun(environment):
    with pytest.raises(ConfigError, match="without torchrun"):
        pretrain_gpt.main(["-m", "seed=1,2"], environment)


def test_errors_without_an_exit_code_keep_their_traceback(monkeypatch, capsys):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(pretrain_gpt, "main", fail)
    assert pretrain_gpt.run() == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("unheard", "said"), [(True, "error: RANK=1 is there twice\n"), (False, "")])
def test_what_rank_zero_cannot_say_another_rank_says(monkeypatch, capsys, unheard, said):
    def fail(*_):
        raise RendezvousError("RANK=1 is there twice", 78, unheard=unheard)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(pretrain_gpt, "main", fail)
    assert pretrain_gpt.run() == 78
    assert capsys.readouterr().err == said
