"""Learning rate and weight decay by name: which parameters an entry of optimizer.groups takes, and what it says."""

import pytest
import torch

from core.config import ModelConfig
from models.gpt import build_meta_model
from parallel.initialization import materialize
from runtime.errors import ConfigError
from settings.config import OptimizerConfig
from settings.parameter_groups import parse_group
from training.optimizer import build_optimizer

CONFIG = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=31, max_position_embeddings=8,
                     tie_embeddings=False)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "pattern", "settings"),
    [
        ("*:lr_scale=0.5", "*", {"lr_scale": 0.5}),
        ("a[1]?.b*:weight_decay=1e-2, lr_scale = 2", "a[1]?.b*", {"weight_decay": 0.01, "lr_scale": 2.0}),
        ("head.weight:lr_scale=0", "head.weight", {"lr_scale": 0.0}),
    ],
)
def test_an_entry_is_a_pattern_and_settings(text, pattern, settings):
    assert parse_group(text) == (pattern, settings)


def found(name, *groups):
    model = build_meta_model(CONFIG, torch.float32)
    materialize(model, 0, torch.device("cpu"))
    optimizer = build_optimizer(model, OptimizerConfig(name=name, weight_decay=0.1, groups=list(groups)))
    names = {parameter: name for name, parameter in model.named_parameters()}
    settings = {
        names[parameter]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert settings.keys() == set(names.values())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    return settings


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_entries_decay_falls_on_matrices_of_layers_and_head(name):
    for parameter, settings in found(name).items():
        is_matrix = parameter.endswith(".weight") and "norm" not in parameter and "embedding" not in parameter
        assert settings == (1.0, 0.1 if is_matrix else 0.0), parameter


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_last_entry_that_names_a_setting_wins(name):
    plain = found(name)
    settings = found(
        name, "*:lr_scale=0.5", "*.mlp.*:weight_decay=0.3,lr_scale=3", "*norm*:weight_decay=0.2", "*.up.*:lr_scale=4"
    )
    for parameter, (scale, decay) in settings.items():
        if ".mlp." in parameter:
            assert (scale, decay) == (4.0 if ".up." in parameter else 3.0, 0.3)
        elif "norm" in parameter:
            assert (scale, decay) == (0.5, 0.2)
        else:
            assert (scale, decay) == (0.5, plain[parameter][1])


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("embeding.word.weight", "did you mean embedding.word.weight?"),
        ("*fnal_norm.weight*", "did you mean final_norm.weight?"),
        ("Head.weight", "did you mean head.weight?"),
        ("*xyz*", "names are like embedding.word.weight and head.weight"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_closest_name(pattern, said):
    with pytest.raises(ConfigError) as caught:
        found("adamw", f"{pattern}:lr_scale=2", "*:lr_scale=1")
    assert str(caught.value) == f"optimizer.groups: {pattern} matches no parameter; {said}"
