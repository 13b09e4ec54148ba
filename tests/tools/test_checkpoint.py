"""`kilotron checkpoint` lists, shows and verifies, and its exit code says what it found."""

import shutil

import pytest
import torch
import torch.distributed as dist

from checkpoint.manifest import read_manifest
from checkpoint.save import save_checkpoint
from tools.cli import main

STATE = {"consumed_samples": 12, "consumed_tokens": 384, "eval_loss": 2.5, "torch": "2.13.0",
         "saved": "2026-11-22 03:00:00",
         "config": {"parallel": {"tp": 2, "dp_shard": 3}, "optimizer": {"name": "muon"}}}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for step in (10, 20):
        tensors = {"model.weight": torch.ones(3, 5), "optimizer.step.weight": torch.tensor(7.0)}
        save_checkpoint(tmp_path, step, tensors, STATE, keep=2)
    dist.destroy_process_group()
    return tmp_path


def test_a_run_is_listed_shown_and_verified(run_dir, capsys):
    (run_dir / "checkpoints" / "step_00000030.tmp-deadbeef").mkdir()
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    _, newest, oldest = capsys.readouterr().out.splitlines()
    assert newest.startswith("step_00000020")
    assert "2.500" in oldest
    assert "2026-11-22 03:00:00" in oldest
    assert main(["checkpoint", "show", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    for part in ("step             20", "15 in 1 tensors", "12 samples, 384 tokens", "dp_shard=3 tp=2", "muon"):
        assert part in shown
    assert main(["checkpoint", "show", str(run_dir / "checkpoints" / "step_00000010")]) == 0
    assert "step             10" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(run_dir / "checkpoints")]) == 0
    assert capsys.readouterr().out.count("as they were written") == 2


def test_damage_is_named_and_ends_with_74(run_dir, capsys):
    file = run_dir / "checkpoints" / "step_00000020" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["checkpoint", "list", str(run_dir)]) == 0, "lengths alone are compared"
    assert "expected" not in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(run_dir)]) == 74
    printed = capsys.readouterr()
    assert "rank_00000.safetensors: expected sha256" in printed.out
    assert "step_00000010: 1 file, " in printed.out
    assert "damaged: step_00000020;" in printed.err
    file.write_bytes(content[:-1])
    (file.parent.parent / "step_00000010" / "manifest.json").write_text("{}")
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    listed = capsys.readouterr().out
    shutil.copy(file.parent.parent / "step_00000010" / "manifest.json", file.parent)
    assert main(["checkpoint", "show", str(run_dir)]) == 74
    assert "other checkpoints: " in capsys.readouterr().err
    assert "bytes, found" in listed
    assert "not a valid manifest" in listed


def test_what_was_set_aside_is_none_of_the_runs(run_dir, capsys):
    (run_dir / "checkpoints" / "step_00000020").rename(run_dir / "checkpoints" / "step_00000020.corrupt")
    (run_dir / "checkpoints" / "step_00000020.corrupt" / "rank_00000.safetensors").write_bytes(b"")
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert "step_00000020.corrupt: set aside" in capsys.readouterr().out
    assert main(["checkpoint", "show", str(run_dir)]) == 0
    assert "step             10" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(run_dir / "checkpoints" / "step_00000020.corrupt")]) == 74


@pytest.mark.parametrize("state", [{"config": 3, "data": [1], "eval_loss": "low", "saved": [2]}, {}])
def test_a_state_is_anybodys_json(run_dir, capsys, state):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    save_checkpoint(run_dir, 30, {"model.weight": torch.ones(2)}, state, keep=1)
    dist.destroy_process_group()
    for action in ("list", "show", "verify"):
        assert main(["checkpoint", action, str(run_dir)]) == 0


def test_where_there_is_none_says_so(run_dir, capsys):
    shutil.rmtree(run_dir / "checkpoints")
    for path in (run_dir, run_dir / "absent", run_dir / "checkpoints" / "step_00000010"):
        assert main(["checkpoint", "list", str(path)]) == 78
        assert "holds no checkpoint" in capsys.readouterr().err


def test_a_checkpoint_that_its_run_removes_meanwhile_is_no_damage(run_dir, capsys, monkeypatch):
    pruned = run_dir / "checkpoints" / "step_00000010"

    def read(path):
        if path == pruned:
            shutil.rmtree(pruned, ignore_errors=True)
        return read_manifest(path)

    monkeypatch.setattr("tools.checkpoint.read_manifest", read)
    kept = shutil.copytree(pruned, run_dir / "kept")
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    assert "step_00000010" not in capsys.readouterr().out
    shutil.copytree(kept, pruned)
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert "step_00000010: removed meanwhile by its run" in capsys.readouterr().out
