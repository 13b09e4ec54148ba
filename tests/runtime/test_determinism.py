"""`train.deterministic`: two runs are one, bit for bit, and what cannot be so is refused by its name."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pretrain_gpt
from runtime.determinism import translate_nondeterminism_errors
from runtime.errors import NonDeterministicError
from verification.local_ranks import run_ranks

WORDS = ["model=tiny", "model.num_layers=4", "model.hidden_size=48", "model.dropout=0.1", "data=sample",
         "data.tokenizer=bytes", "data.seq_length=32", "train.steps=3", "train.global_batch_size=8",
         "train.micro_batch_size=1", "train.precision=bf16", "train.deterministic=true"]  # fmt: skip
VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "TORCHINDUCTOR_DETERMINISTIC")


def one_rank(rank, world_size, words):
    """Exit code of a run, and what stands of determinism after it; the compiler was imported before."""
    import torch._inductor.config

    code = pretrain_gpt.main(words, os.environ)
    determined = torch.are_deterministic_algorithms_enabled(), torch._inductor.config.deterministic
    return code, *determined, *map(os.environ.get, VARIABLES)


def rank_with_a_bad_operation(rank, world_size, words):
    """A run whose second layer does what torch cannot do deterministically."""
    from core.block import TransformerLayer

    forward = TransformerLayer.forward

    def forward_and_put(self, *arguments, **settings):
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))
        return forward(self, *arguments, **settings)

    TransformerLayer.forward = forward_and_put
    return pretrain_gpt.main(words, os.environ)


@pytest.fixture(scope="module")
def out_dir(runs_folder):
    return runs_folder("runs")


def written(out_dir, name):
    """Digests of what a run saved, and its losses."""
    lines = [json.loads(line) for line in (out_dir / name / "metrics.jsonl").read_text().splitlines()]
    files = sorted((out_dir / name / "checkpoints" / "step_00000003").glob("*.safetensors"))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return digests, [(line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(["parallel.dp_shard=2"], marks=pytest.mark.slow),
        ["parallel.pp=2", "parallel.pp_schedule=interleaved"],
    ],
    ids=["shards", "pipeline"],
)
def test_two_runs_are_equal_bit_for_bit(out_dir, layout, monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Tree")  # the user's own choice stays
    names = [f"{layout[0]}.{number}" for number in range(2)]
    for name in names:
        found = run_ranks(2, one_rank, [*WORDS, *layout, f"out_dir={out_dir}", f"name='{name}'"], initialize=False)
        assert found == [(0, True, True, ":4096:8", "Tree", "1")] * 2
    first, second = (written(out_dir, name) for name in names)
    assert len(first[0]) == 2
    assert first == second


@pytest.mark.parametrize("layout", [[], ["parallel.pp=2"]], ids=["alone", "pipeline"])
def test_an_operation_that_is_not_deterministic_ends_the_run_by_its_name(out_dir, layout):
    name = f"bad{len(layout)}"
    words = [*WORDS, *layout, f"out_dir={out_dir}", f"name={name}"]
    with pytest.raises(NonDeterministicError, match=r"put_ has no .*; use train.deterministic=false") as caught:
        run_ranks(1 + len(layout), rank_with_a_bad_operation, words, initialize=False)
    assert caught.value.exit_code == 78
    assert "put_ has no deterministic" in json.loads((out_dir / name / "status.json").read_text())["reason"]
    if not layout:
        assert run_ranks(1, rank_with_a_bad_operation, [*words, "train.deterministic=false"], initialize=False) == [0]


def test_the_compiler_is_imported_late_enough_to_be_told():
    code = "import sys, training.run; sys.exit('torch._inductor.config' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(pretrain_gpt.__file__).parent, check=True)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="no room"), translate_nondeterminism_errors():
        raise RuntimeError("no room")
