"""Initial weights depend on seed and name alone."""

import torch
from torch import nn

from parallel.initialization import materialize
from parallel.tensor import ColumnParallelLinear, TensorParallel, VocabParallelEmbedding

ALONE = TensorParallel()


class Pair(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        with torch.device("meta"):
            self.first = ColumnParallelLinear(20, 30, bias=True, init_std=0.5, tensor=ALONE)
            self.second = ColumnParallelLinear(20, 30, bias=True, init_std=0.5, tensor=ALONE)
            self.table = VocabParallelEmbedding(30, 20, init_std=2.0, tensor=ALONE)
        self.to(dtype)


def build(seed=0, dtype=torch.float32):
    pair = Pair(dtype)
    materialize(pair, seed, torch.device("cpu"))
    return pair


def test_names_and_seeds_give_different_weights():
    pair = build()
    assert not torch.equal(pair.first.weight, pair.second.weight)
    assert not torch.equal(pair.first.weight, build(seed=1).first.weight)
    assert torch.equal(pair.first.weight, build().first.weight)


def test_a_parameter_does_not_depend_on_those_around_it():
    alone = nn.Module()
    with torch.device("meta"):
        alone.second = ColumnParallelLinear(20, 30, bias=True, init_std=0.5, tensor=ALONE)
    materialize(alone, 0, torch.device("cpu"))
    assert torch.equal(alone.second.weight, build().second.weight)


def test_precisions_start_from_the_same_numbers():
    single, double = build(), build(dtype=torch.float64)
    assert double.table.weight.dtype == torch.float64
    assert torch.equal(single.table.weight.double(), double.table.weight)


def test_every_parameter_is_written():
    pair = Pair()
    pair.to_empty(device="cpu")
    for parameter in pair.parameters():
        nn.init.constant_(parameter, float("nan"))
    materialize(pair, 0, torch.device("cpu"))
    assert all(torch.isfinite(parameter).all() for parameter in pair.parameters())
