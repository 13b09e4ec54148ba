"""Every layout goes on from every other's checkpoint: weights and moments byte for byte, and the losses that follow."""

import itertools
import json
import os
import shutil
from datetime import timedelta

import numpy as np
import pytest
import torch

import pretrain_gpt
from checkpoint.manifest import read_manifest
from checkpoint.save import save_checkpoint
from checkpoint.tensor_files import TORCH_DTYPES, read_parts
from parallel.process_group import process_group
from parallel.sharding import Box, TensorPart
from runtime.fault_injection import Faults
from runtime.heartbeat import Heartbeat
from runtime.stop import StopRequest
from settings.compose import compose
from settings.resolve import resolve
from training.optimizer import training_tensors
from training.trainer import Trainer
from verification.local_ranks import run_ranks

WORDS = ["model=tiny", "model.num_layers=4", "model.hidden_size=48", "data=sample", "data.tokenizer=bytes",
         "data.seq_length=32", "train.precision=fp64", "optimizer.lr=1e-2", "train.global_batch_size=12",
         "train.micro_batch_size=1", "train.steps=5"]  # fmt: skip
LAYOUTS = {
    "single": (1, []),
    "dp2": (2, ["parallel.dp_shard=2"]),
    "dp3": (3, ["parallel.dp_shard=3"]),
    "tp2 dp_shard2": (4, ["parallel.tp=2", "parallel.dp_shard=2"]),
    "pp2 tp2": (4, ["parallel.pp=2", "parallel.tp=2"]),
    "pp2 zbv": (2, ["parallel.pp=2", "parallel.pp_schedule=zbv"]),
    "tp4": (4, ["parallel.tp=4"]),
}


def one_rank(rank, world_size, words):
    return pretrain_gpt.main(words, os.environ)


def load_and_save(rank, world_size, words, target):
    """Takes up a run in its layout and saves what it has, without a step in between."""
    config = resolve(compose(words), os.environ)
    with process_group(timedelta(minutes=2)) as process, Heartbeat(target / "logs", rank, 100) as heartbeat:
        trainer = Trainer(config, process, None, StopRequest(target / "STOP"), heartbeat, Faults())
        tensors = training_tensors(trainer.parameters, trainer.optimizer, trainer.shapes)
        return save_checkpoint(target, trainer.step, tensors, {}, keep=1)


def whole_tensors(path):
    manifest = read_manifest(path)
    parts = {
        name: TensorPart(
            torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype]),
            Box((0,) * len(entry.shape), entry.shape),
            entry.shape,
        )
        for name, entry in manifest.tensors.items()
    }
    read_parts(path, manifest, parts)
    return {name: part.values.numpy().tobytes() for name, part in parts.items()}


def losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: [record["loss"], record["grad_norm"]] for record in records if "loss" in record}


@pytest.fixture(scope="module")
def stopped(runs_folder):
    """(folder with a run of each layout that stopped at step 3, the numbers of one that did not)"""
    folder = runs_folder("matrix")
    words = [*WORDS, f"out_dir={folder}"]
    assert run_ranks(1, one_rank, [*words, "name=whole"], initialize=False) == [0]
    for layout, (ranks, settings) in LAYOUTS.items():
        stop = [f"name={layout}", "train.exit_after=3"]
        assert set(run_ranks(ranks, one_rank, [*words, *settings, *stop], initialize=False)) == {75}
    return folder, losses(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_a_layout_goes_on_from_another(stopped, source, target):
    folder, expected = stopped
    run_dir, (ranks, settings) = folder / "continued", LAYOUTS[target]
    shutil.copytree(folder / source, run_dir)
    words = [*WORDS, *settings, f"out_dir={folder}", "name=continued"]
    try:
        saved = run_ranks(ranks, load_and_save, words, run_dir / "again", initialize=False)[0]
        assert whole_tensors(saved) == whole_tensors(folder / source / "checkpoints" / "step_00000003")
        assert set(run_ranks(ranks, one_rank, words, initialize=False)) == {0}
        found = losses(run_dir)
        assert found.keys() == expected.keys()
        np.testing.assert_allclose([found[step] for step in (4, 5)], [expected[step] for step in (4, 5)], rtol=1e-10)
    finally:
        shutil.rmtree(run_dir)
