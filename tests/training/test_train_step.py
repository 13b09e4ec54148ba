"""A step: NaN moves nothing, clipping clips, and weight decay falls on matrices alone."""

from datetime import timedelta

import numpy as np
import pytest
import torch

from core.config import ModelConfig
from data.batches import MicroBatch
from models.gpt import build_meta_model
from parallel.config import ParallelConfig
from parallel.data_parallel import shard_data_parallel
from parallel.initialization import materialize
from parallel.mesh import ParallelMesh
from parallel.process_group import process_group
from parallel.sharding import logical_shapes
from settings.config import OptimizerConfig
from training.optimizer import build_optimizer, training_tensors
from training.precision import PRECISIONS, LossScale
from training.train_step import TrainStep

CONFIG = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=31, max_position_embeddings=8)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def group():
    with process_group(timedelta(seconds=30)):
        yield


def build(clip_grad=1.0, precision="fp32", model_config=CONFIG, loss_scale=2.0**10, **optimizer):
    mesh = ParallelMesh(ParallelConfig(dp_shard=1), "cpu")
    chosen = PRECISIONS[precision]
    model = build_meta_model(model_config, chosen.master)
    data_parallel = shard_data_parallel(model, model.sharding_units(), mesh, 3, chosen.compute)
    materialize(model, 0, CPU)
    scale = LossScale(loss_scale, 2, CPU) if precision == "fp16" else None
    built = build_optimizer(model, OptimizerConfig(**optimizer))
    return model, TrainStep(data_parallel, built, mesh, clip_grad, CPU, scale)


def batch(seed=0, rows=2):
    tokens = np.random.default_rng(seed).integers(0, 31, (rows, 9))
    return MicroBatch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), [], np.arange(len(tokens)))


def state(model, step):
    return {
        name: t.values.clone()
        for name, t in training_tensors(dict(model.named_parameters()), step.optimizer, logical_shapes(model)).items()
    }


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_not_finite_moves_neither_weights_nor_moments_nor_any_later_step(name, poison, precision):
    model, step = build(precision=precision, name=name)
    step(1, [batch()], 1e-2)
    before = state(model, step)
    hook = model.block.register_forward_hook(lambda _module, _inputs, output: output * poison)
    result = step(2, [batch(1)], 1e-2)
    hook.remove()
    step(3, [batch(2)], 1e-2)
    after = state(model, step)
    assert not all(map(np.isfinite, result.numbers.read()))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_steps_move_every_weight_and_count():
    model, step = build()
    before = state(model, step)
    result = step(1, [batch()], 1e-2)
    after = state(model, step)
    assert all(map(np.isfinite, result.numbers.read()))
    # the bias of a key shifts all scores alike, so that it has no gradient
    still = [name for name in before if torch.equal(before[name], after[name]) and "key.bias" not in name]
    assert still == []
    assert all(value == 1 for name, value in after.items() if name.startswith("optimizer.step."))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_group_moves_at_a_multiple_of_the_scheduled_rate(name):
    moved = {}
    for groups in ([], ["embedding.*:lr_scale=0", "*.query.weight:lr_scale=0.25"]):
        model, step = build(name=name, groups=groups, weight_decay=0.0)
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        step(1, [batch()], 1e-2)
        moved[len(groups)] = {key: parameter.detach() - before[key] for key, parameter in model.named_parameters()}
    for key, by in moved[2].items():
        scale = 0.0 if key.startswith("embedding.") else 0.25 if key.endswith("query.weight") else 1.0
        torch.testing.assert_close(by, scale * moved[0][key], rtol=1e-4, atol=1e-7)


def test_clipping_scales_the_gradient_to_the_limit_and_reports_the_norm_before(monkeypatch):
    seen = []
    model, step = build(clip_grad=0.01)
    monkeypatch.setattr(step.optimizer, "step", lambda: seen.append([p.grad.clone() for p in model.parameters()]))
    _, norm = step(1, [batch()], 1e-2).numbers.read()
    assert norm > 0.1
    assert torch.stack([g.norm() for g in seen[0]]).norm().item() == pytest.approx(0.01, rel=1e-3)
    step.clip_grad = 0.0
    _, norm = step(2, [batch()], 1e-2).numbers.read()
    assert torch.stack([g.norm() for g in seen[1]]).norm().item() == pytest.approx(norm, rel=1e-5)


def test_weight_decay_falls_on_the_matrices_of_linear_layers_alone():
    model, step = build(weight_decay=0.5, eps=1.0)
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    decayed = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    assert decayed == {name for name in parameters if name.startswith("block") and parameters[name].dim() == 2}
    assert all(torch.allclose(parameters[name], before[name] * (1 - 0.5 * OptimizerConfig().lr)) for name in decayed)


def test_the_loss_is_a_mean_over_tokens_that_count_wherever_they_lie():
    model, step = build(precision="fp64")
    whole = batch(rows=4)
    whole.labels[0, :] = -100
    whole.labels[1, 2:] = -100
    parts = [
        MicroBatch(whole.input_ids[rows], whole.labels[rows], [], whole.sample_indices[rows])
        for rows in (slice(0, 1), slice(1, 4))
    ]
    accumulated = step.accumulate([whole])
    losses, tokens = accumulated.local_losses, accumulated.tokens
    once = [parameter.grad.clone() for parameter in model.parameters()]
    step.optimizer.zero_grad()
    accumulated = step.accumulate(parts)
    split_losses, split_tokens = accumulated.local_losses, accumulated.tokens
    assert tokens == split_tokens == 2 + 8 + 8
    torch.testing.assert_close(losses.sum(), split_losses.sum(), rtol=1e-12, atol=0)
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


def test_a_float16_step_that_overflows_moves_nothing_halves_the_scale_and_the_next_one_moves():
    model, step = build(precision="fp16", loss_scale=2.0**30)
    before = state(model, step)
    result = step(1, [batch()], 1e-2)
    assert np.isfinite(result.numbers.read()[0])
    assert not np.isfinite(result.numbers.read()[1])
    assert result.numbers.loss_scale() == 2.0**30
    assert step.loss_scale.scale.item() == 2.0**29
    after = state(model, step)
    assert all(torch.equal(before[name], after[name]) for name in before)
    step.loss_scale.scale.fill_(2.0**10)
    for number in (2, 3):
        assert all(map(np.isfinite, step(number, [batch()], 1e-2).numbers.read()))
    after = state(model, step)
    assert all(value == 2 for name, value in after.items() if name.startswith("optimizer.step."))
    assert not torch.equal(before["model.final_norm.weight"], after["model.final_norm.weight"])
    assert step.loss_scale.scale.item() == 2.0**11, "after two good steps"


def test_losses_gradients_and_norm_of_float16_are_those_of_float32_whatever_the_scale():
    exact_model, exact = build(clip_grad=0.0)
    expected = exact.accumulate([batch()])
    for scale in (1.0, 2.0**12):
        model, step = build(clip_grad=0.0, precision="fp16", loss_scale=scale)
        found = step.accumulate([batch()])
        torch.testing.assert_close(found.local_losses, expected.local_losses, rtol=2e-3, atol=0)
        for parameter, other in zip(model.parameters(), exact_model.parameters(), strict=True):
            gradient = parameter.grad.to_local()
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, other.grad, rtol=0.02, atol=2e-4)
        norm = torch.stack([parameter.grad.norm() for parameter in exact_model.parameters()]).norm().item()
        assert step.update(1, found, [batch()], 1e-2).numbers.read()[1] == pytest.approx(norm, rel=5e-3)


def test_without_a_loss_scale_none_is_reported():
    _, step = build()
    assert step(1, [batch()], 1e-2).numbers.loss_scale() is None
