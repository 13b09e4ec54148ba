"""Dropout by hash: its exact formula, the same elements in every layout, chance-like statistics, exact gradients."""

import functools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from core.dropout import CPU_BLOCK_BYTES, DropoutKey, DropoutSite, dropout, dropout_site_hash

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
INT64 = st.integers(-(2**63), 2**63 - 1)
SMALL = st.integers(0, 2**20)


def key_of(samples, positions, hidden, rate=0.25, seed=1234):
    return DropoutKey.build(rate, seed, torch.as_tensor(samples), torch.as_tensor(positions), hidden)


def dropped(samples, positions, hidden, rate=0.25, seed=1234, layer=3, site=DropoutSite.MLP):
    """Which elements `[batch, seq, hidden]` are dropped."""
    ones = torch.ones(len(samples), len(positions), hidden)
    return dropout(ones, key_of(samples, positions, hidden, rate, seed), dropout_site_hash(layer, site)) == 0


def reference_hash(seed, sample, layer, site, position, channel):
    """How far the hash of one element, an int64, is above the least int64; in unsigned arithmetic."""

    def mix(bits):
        for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            bits = (bits ^ (bits >> shift)) * multiplier % 2**64
        return bits

    def absorb(state, value):
        return mix((state + value * 0x9E3779B97F) % 2**64)

    row = absorb(absorb(absorb(0, seed + 1), sample), position)
    return absorb(mix((row + absorb(absorb(0, layer + 1), site)) % 2**64), channel) ^ 2**63


@settings(max_examples=200, deadline=None)
@given(
    seed=INT64,
    sample=INT64,
    layer=SMALL,
    site=st.sampled_from(DropoutSite),
    position=SMALL,
    channel=st.integers(0, 40),
)
def test_an_element_is_dropped_exactly_where_its_hash_is_below_the_rate(seed, sample, layer, site, position, channel):
    threshold = reference_hash(seed, sample, layer, site, position, channel) >> 11
    assume(0 < threshold < 2**53 - 1)
    for rate, expected in ((threshold / 2**53, False), ((threshold + 1) / 2**53, True)):
        assert dropped([sample], [position], 41, rate, seed, layer, site)[0, 0, channel] == expected


def test_the_same_arguments_drop_the_same_elements_whatever_the_generators_state():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = dropped(range(4), range(16), 32)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(dropped(range(4), range(16), 32), first)


@pytest.mark.parametrize("hidden", [1, 37, CPU_BLOCK_BYTES // 64, CPU_BLOCK_BYTES // 8 + 1])
def test_parts_of_a_batch_and_of_a_sequence_drop_what_the_whole_drops(hidden):
    samples, positions = [7, 2**40, 0, 5], list(range(20))
    whole = dropped(samples, positions, hidden)
    zigzag = [0, 1, 2, 17, 18, 19]
    assert torch.equal(dropped(samples, zigzag, hidden), whole[:, zigzag])
    assert torch.equal(dropped(samples, positions[13:], hidden), whole[:, 13:])
    assert torch.equal(dropped([5, 7], positions, hidden), whole[[3, 0]])


@functools.cache
def signs(rate):
    """1 - rate where dropped, -rate where kept: `[seed, layer, site, sample, position, channel]`, expected mean 0."""
    grid = [
        [[dropped(range(16), range(20), 96, rate, seed, layer, site) for site in DropoutSite] for layer in range(5)]
        for seed in range(4)
    ]
    return torch.stack([torch.stack([torch.stack(sites) for sites in layers]) for layers in grid]).double() - rate


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_each_coordinate_value_drops_at_the_rate(rate):
    table = signs(rate)
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(table.mean()) < 5 * deviation / table.numel() ** 0.5
    for axis in range(table.ndim):
        means = table.movedim(axis, 0).flatten(1).mean(1)
        assert means.abs().max() < 5 * deviation / (table.numel() / len(means)) ** 0.5


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_totals_scatter_as_those_of_independent_elements(rate):
    table = signs(rate)
    for axis in range(table.ndim):
        sums = table.sum(axis)
        variance = table.shape[axis] * rate * (1 - rate)
        fourth_moment = 3 * variance**2 + variance * (1 - 6 * rate * (1 - rate))
        standard_error = ((fourth_moment - variance**2) / sums.numel()) ** 0.5
        assert abs((sums**2).mean() - variance) < 5 * standard_error


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbours_are_uncorrelated_in_every_coordinate(rate):
    table = signs(rate) / (rate * (1 - rate)) ** 0.5
    for axis in range(table.ndim):
        for distance in (1, 2, 3, 4, 8, 16, 32, 64):
            count = table.shape[axis] - distance
            if count > 0:
                products = table.narrow(axis, 0, count) * table.narrow(axis, distance, count)
                assert abs(products.mean()) < 5 / products.numel() ** 0.5, (axis, distance)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_corners_of_rectangles_are_uncorrelated_in_every_pair_of_coordinates(rate):
    """Fails where the hash is a sum or exclusive or of its coordinates' hashes, which no pair of elements shows."""
    table = signs(rate) / (rate * (1 - rate)) ** 0.5
    for first in range(table.ndim):
        edges = table.narrow(first, 0, table.shape[first] - 1) * table.narrow(first, 1, table.shape[first] - 1)
        for second in range(first + 1, table.ndim):
            count = table.shape[second] - 1
            corners = edges.narrow(second, 0, count) * edges.narrow(second, 1, count)
            assert abs(corners.mean()) < 5 / corners.numel() ** 0.5, (first, second)


def test_coordinates_are_not_exchangeable():
    square = dropped(range(64), range(64), 64)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        agreement = (square == square.transpose(one, other)).double().mean()
        assert abs(agreement - (0.25**2 + 0.75**2)) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_elements_and_their_gradients_are_scaled_and_the_others_zero(dtype):
    rate = 0.3
    x = torch.randn(3, 11, 50, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    result = dropout(x, key_of(range(3), range(11), 50, rate), dropout_site_hash(3, DropoutSite.MLP))
    (gradient,) = torch.autograd.grad(result, x, torch.ones_like(result))
    mask = ~dropped(range(3), range(11), 50, rate)
    assert result.dtype == gradient.dtype == dtype
    assert torch.equal(result, torch.where(mask, x * (1 / (1 - rate)), 0))
    assert torch.equal(gradient, mask.double().div(1 - rate).to(dtype))


def test_any_strides_will_do():
    x = torch.randn(50, 11, 3, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    key = key_of(range(3), range(11), 50)
    result = dropout(x, key, dropout_site_hash(0, DropoutSite.EMBEDDING))
    assert torch.equal(result, dropout(x.contiguous(), key, dropout_site_hash(0, DropoutSite.EMBEDDING)))
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert torch.equal(gradient != 0, result != 0)


def test_gradcheck():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    key = key_of(range(2), range(3), 5)
    assert torch.autograd.gradcheck(lambda x: dropout(x, key, dropout_site_hash(1, DropoutSite.ATTENTION)), (x,))


def test_only_one_number_per_row_is_saved_beside_the_channels_of_the_key():
    saved = []
    x = torch.randn(4, 8, 64, requires_grad=True)
    key = key_of(range(4), range(8), 64)
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        dropout(x, key, dropout_site_hash(1, DropoutSite.MLP))
    rows, channels = saved
    assert (rows.dtype, rows.numel()) == (torch.int64, 4 * 8)
    assert channels.data_ptr() == key.channels.data_ptr()


class LargestHashes(TorchDispatchMode):
    """Notes the size of the largest int64 tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.int64:
            self.bytes = max(self.bytes, result.nbytes)
        return result


def test_the_hashes_of_all_elements_are_never_held_at_once():
    x = torch.zeros(4, 256, 1024, requires_grad=True)
    key = key_of(range(4), range(256), 1024)
    with LargestHashes() as largest:
        dropout(x, key, dropout_site_hash(1, DropoutSite.MLP)).sum().backward()
    assert CPU_BLOCK_BYTES / 2 < largest.bytes <= CPU_BLOCK_BYTES < x.numel() * 8 / 2


def test_recomputation_drops_the_same_elements():
    x = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, 16, dtype=torch.float64, requires_grad=True)
    key = key_of(range(2), range(6), 16)

    def layer(x):
        return dropout(torch.sin(x @ weight), key, dropout_site_hash(1, DropoutSite.MLP))

    plain, again = layer(x), checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    assert torch.equal(plain, again)
    expected = torch.autograd.grad(plain.square().sum(), (x, weight))
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), (x, weight)), expected, rtol=0, atol=0)


def test_nothing_to_drop_returns_the_very_tensor():
    x = torch.randn(2, 3, 5)
    assert dropout(x, None, dropout_site_hash(0, DropoutSite.MLP)) is x
    assert dropout(x, key_of(range(2), range(3), 5, rate=0.0), dropout_site_hash(0, DropoutSite.MLP)) is x


@pytest.mark.parametrize("shape", [(2, 6, 5), (3, 2, 5), (6, 5), (2, 3, 4)])
def test_a_key_of_other_rows_or_channels_is_refused(shape):
    with pytest.raises(ValueError, match=r"key of its rows and channels, not one of \(2, 3, 5\)"):
        dropout(torch.ones(shape), key_of(range(2), range(3), 5), dropout_site_hash(0, DropoutSite.MLP))


def test_a_compiled_graph_takes_the_channels_as_an_input():
    """Inductor makes an index of a channel that the graph numbers, and Triton's 32 bits do not hold its multiples."""
    numbered = []

    def look(graph, _):
        parts = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        numbered.extend(node for part in parts for node in part.graph.nodes if "arange" in str(node.target))
        return graph.forward

    x, key = torch.ones(2, 3, 5, requires_grad=True), key_of(range(2), range(3), 5)
    place = dropout_site_hash(0, DropoutSite.MLP)
    torch._dynamo.reset()
    compiled = torch.compile(dropout, backend=look, fullgraph=True)
    assert torch.equal(compiled(x, key, place), dropout(x, key, place))
    assert numbered == []


@pytest.mark.gpu
@pytest.mark.cuda_only("a GPU drops what a CPU drops")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_returns_the_bits_of_the_cpu(dtype):
    x = torch.randn(3, 700, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    samples, positions = torch.tensor([0, 9, 2**40]), torch.arange(700)
    results = [
        dropout(
            x.to(device),
            DropoutKey.build(0.1, 5, samples.to(device), positions.to(device), 4096),
            dropout_site_hash(2, DropoutSite.ATTENTION),
        )
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(results[0], results[1].cpu())
