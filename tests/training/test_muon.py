"""Muon: torch's arithmetic bit for bit in one process, and steps that are skipped; layouts are tests/parity's."""

import pytest
import torch

from core.config import ModelConfig
from models.gpt import build_meta_model
from parallel.initialization import materialize
from parallel.sharding import logical_shapes
from settings.config import OptimizerConfig
from training.muon import orthogonalize
from training.optimizer import build_optimizer, training_tensors

CONFIG = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=31, max_position_embeddings=8)


def model_with_optimizer(dtype=torch.float32, **settings):
    model = build_meta_model(CONFIG, dtype)
    materialize(model, 0, torch.device("cpu"))
    return model, build_optimizer(model, OptimizerConfig(name="muon", **settings))


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = drawn.to(parameter.dtype)


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_one_process_equals_torch_bit_for_bit(adjust_lr, nesterov):
    model, optimizer = model_with_optimizer(adjust_lr=adjust_lr, nesterov=nesterov, newton_schulz_steps=4)
    reference, _ = model_with_optimizer()
    hidden = {n for n, p in reference.named_parameters() if n.startswith("block.") and p.dim() == 2}
    named = dict(reference.named_parameters())
    decayed = [named[name] for name in hidden]
    theirs = [
        torch.optim.Muon(decayed, lr=6e-4, weight_decay=0.1, adjust_lr_fn=adjust_lr, nesterov=nesterov, ns_steps=4),
        torch.optim.AdamW(
            [p for n, p in named.items() if n not in hidden], lr=6e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]
    for step in range(4):
        set_gradients(model, step)
        set_gradients(reference, step)
        optimizer.step()
        for one in theirs:
            one.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, named[name]), name


def test_the_iteration_makes_a_matrix_nearly_orthogonal_in_its_own_dtype():
    for shape in ((6, 20), (20, 6), (8, 8)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = orthogonalize(matrix, 5)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        assert (found.dtype, found.shape) == (torch.float64, matrix.shape)
        assert 0.5 < torch.linalg.svdvals(found).min() <= torch.linalg.svdvals(found).max() < 1.3
        assert ((u.T @ found @ v.T).diagonal() > 0.5).all(), "the directions stay"
    assert not orthogonalize(torch.zeros(3, 4), 5).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skipped_step_leaves_weights_moments_and_counters_whatever_the_gradients_are(dtype):
    model, optimizer = model_with_optimizer(dtype)
    set_gradients(model, 0)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    state = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad.fill_(float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for parameter, weight, held in zip(model.parameters(), before, state, strict=True):
        assert torch.equal(parameter, weight)
        assert all(torch.equal(value, held[key]) for key, value in optimizer.state[parameter].items())
    optimizer.found_inf = torch.zeros(())
    set_gradients(model, 1)
    optimizer.step()
    assert all(not torch.equal(p, weight) for p, weight in zip(model.parameters(), before, strict=True))


def test_all_state_is_there_before_the_first_step_for_a_checkpoint_to_fill():
    model, optimizer = model_with_optimizer()
    named = dict(model.named_parameters())
    before = training_tensors(named, optimizer, logical_shapes(model)).keys()
    set_gradients(model, 0)
    optimizer.step()
    assert training_tensors(named, optimizer, logical_shapes(model)).keys() == before
    states = {name: {key.split(".")[1] for key in before if key.endswith(f".{name}") and key[:5] == "optim"}
              for name in named}  # fmt: skip
    assert states["block.layers.0.mlp.up.weight"] == {"momentum_buffer"}
    assert states["block.layers.0.mlp.up.bias"] == states["embedding.word.weight"] == {"step", "exp_avg", "exp_avg_sq"}


def test_float64_is_not_rounded_to_bfloat16():
    model, optimizer = model_with_optimizer(torch.float64)
    other, other_optimizer = model_with_optimizer(torch.float64)
    set_gradients(model, 0)
    set_gradients(other, 0)
    name = "block.layers.0.mlp.up.weight"
    dict(other.named_parameters())[name].grad *= 1 + 1e-9
    optimizer.step()
    other_optimizer.step()
    one, another = dict(model.named_parameters())[name], dict(other.named_parameters())[name]
    assert (one - another).abs().max() < 1e-14
