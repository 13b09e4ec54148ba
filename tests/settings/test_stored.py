"""Stored configurations are data: restored with types and ranges, compared by meaning, no larger than the tensors."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from checkpoint.manifest import Manifest, TensorEntry
from core.config import ModelConfig
from data.config import DataConfig
from runtime.errors import ConfigError, RunError
from settings.config import CheckpointConfig, OptimizerConfig, RunConfig, TrainConfig
from settings.stored import changed_settings, config_of, difference, refuse_another_run, restore_config


def test_another_model_data_or_seed_is_named():
    saved = RunConfig(model=ModelConfig(num_layers=12), data=DataConfig(path="old"))
    current = replace(saved, model=ModelConfig(num_layers=8), data=DataConfig(corpus="sample"), seed=1)
    assert difference(saved, current) == [
        "model.num_layers: was 12, now 8",
        "data.path: was old, now null",
        "data.corpus: was null, now sample",
        "seed: was 1234, now 1",
    ]


def test_what_leaves_the_run_the_same_is_no_difference():
    saved = RunConfig()
    written_out = ModelConfig(ffn_hidden_size=3072, num_query_groups=12, head_dim=64)
    current = RunConfig(
        name="moved",
        model=written_out,
        data=DataConfig(seq_length=1024, num_workers=4),
        train=TrainConfig(steps=5000, micro_batch_size=1),
    )
    assert difference(saved, current) == []


def test_every_setting_that_changed_is_named_and_no_other():
    saved = RunConfig()
    current = replace(saved, name="moved", optimizer=OptimizerConfig(groups=["*:lr_scale=0"]), check=True)
    said = ["name: was run, now moved", "check: was false, now true", "optimizer.groups: was [], now ['*:lr_scale=0']"]
    assert changed_settings(saved, current) == said
    assert changed_settings(saved, saved) == []


def test_another_optimizer_is_a_difference_as_its_state_does_not_fit():
    saved, other = RunConfig(), RunConfig(optimizer=OptimizerConfig(name="muon", lr=1.0))
    assert difference(saved, other) == ["optimizer.name: was adamw, now muon"]
    with pytest.raises(ConfigError, match=r"of another optimizer; checkpoint.drop_moments=true .* name=run-2"):
        refuse_another_run("it", difference(saved, other), "run")
    with pytest.raises(ConfigError, match=r"of another run; choose another name") as refused:
        refuse_another_run("it", difference(saved, replace(other, seed=1)), "run")
    assert "drop_moments" not in str(refused.value), "which alone would not help"
    refuse_another_run("it", [], "run")
    dropping = RunConfig(optimizer=OptimizerConfig(name="muon"), checkpoint=CheckpointConfig(drop_moments=True))
    assert difference(saved, dropping) == []


def test_a_key_that_an_older_version_did_not_know_has_its_default():
    saved = asdict(RunConfig())
    del saved["model"]["qk_norm"], saved["data"]
    assert difference(restore_config(saved), RunConfig()) == []
    changed = RunConfig(model=ModelConfig(qk_norm=True))
    assert difference(restore_config(saved), changed) == ["model.qk_norm: was False, now True"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(({"model": {"depth": 3}}, "model.depth"), ({"model": 3}, "under model"), ({"x": 1}, "holds x")),
        ({"model": {"num_layers": "${oc.env:HOME}"}}, "model.num_layers is not an integer"),
        ({"seed": True}, "seed is not an integer"),
        ({"model": {"num_layers": 0}}, "model.num_layers=0: must be at least 1"),
        ({"data": {"split": [1, "98"]}}, r"data.split is not a list like \[number, number\]"),
    ],
)
def test_a_saved_configuration_that_is_not_understood_is_refused(change: dict, said: str):
    with pytest.raises(RunError, match=said):
        restore_config(change)


def test_a_configuration_of_another_size_than_the_tensors_builds_nothing():
    config = RunConfig(model=ModelConfig(num_layers=10**15, vocab_size=257))
    entry = TensorEntry("F32", (257, 768), ())
    for state, said in [
        ({"config": asdict(config)}, r"of \d+ parameters, its tensors have 197376"),
        ({"config": asdict(RunConfig())}, "its tensors have 197376"),
        ({"config": 3}, "no keys under its root"),
        ({}, "no keys under its root"),
    ]:
        with pytest.raises(ConfigError, match=said):
            config_of(Path("step"), Manifest(1, state, {}, {"model.embedding": entry}))
