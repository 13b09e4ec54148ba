"""Proof that a layout computes what one process does: a few steps of each, everything gathered, all of it compared."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from core.loss import IGNORED_LABEL
from data.batches import MicroBatch
from models.gpt import build_meta_model
from parallel.config import ParallelConfig
from parallel.initialization import materialize
from parallel.mesh import ParallelMesh
from parallel.sharding import Box, local_box, local_values, logical_shapes
from settings.config import RunConfig
from training.build import assemble
from training.compilation import decide_compilation
from training.optimizer import build_optimizer
from training.precision import build_loss_scale
from training.train_step import TrainStep
from verification.local_ranks import run_ranks

LIMIT = 1e-10
"""Largest difference that float64 results of another order of summation may have."""
STEPS = 3
"""One shows a wrong gradient; more show what a wrong update, or a replica that drifts, does to the next."""
GRADIENT_FLOOR = 1e-3
"""Gradients this much smaller than the global norm are compared on the scale of the norm: theirs is rounding."""
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class StepRecord:
    """What one optimizer step found, in whole tensors."""

    loss: float
    gradient_norm: float
    """Before clipping."""
    gradients: dict[str, Array]
    """Before clipping, by the parameter's global name."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """All that a layout computed, in whole tensors without padding."""

    initial_weights: dict[str, Array]
    steps: list[StepRecord]
    weights: dict[str, Array]
    """After the last step."""
    faults: list[str]
    """What no layout may do: ranks that hold the same values differ, or none holds some of them."""


@dataclass(frozen=True)
class Comparison:
    """Differences from one process, each on the scale that `compare` gives it, and what they amount to."""

    loss: float
    gradient: float
    gradient_name: str
    gradient_norm: float
    weight: float
    weight_name: str
    problems: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether the layout computes what one process does."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """`equal`, or all that is not."""
        return "; ".join(self.problems) or "equal"


def verify(config: RunConfig, limit: float = LIMIT, steps: int = STEPS) -> Comparison:
    """Run a resolved configuration's layout on local ranks, and one process, on the same ragged data, and compare.

    Raises RankError where a rank dies, and whatever a rank raises.
    """
    batches = ragged_batches(config, steps)
    reference, found = (
        run_ranks(layout.world_size or 1, parity_rank, layout, batches)[0] for layout in (one_process(config), config)
    )
    return compare(reference, found, limit)


def one_process(config: RunConfig) -> RunConfig:
    """The same run as the definition has it: one process, the whole batch at once, nothing computed twice."""
    train = replace(config.train, micro_batch_size=None, recompute="none", compile=False)
    return replace(config, world_size=1, parallel=ParallelConfig(dp_shard=1), train=train)


def describe_layout(config: RunConfig) -> str:
    """A layout in words: sizes, options that change how it computes, and two of the model that layouts stumble over."""
    layout = config.parallel
    words = [
        f"{key}={getattr(layout, key)}" for key in ("pp", "tp", "dp_replicate", "dp_shard") if getattr(layout, key) > 1
    ]
    words += [layout.pp_schedule, f"layers={config.layers_per_stage}"] if layout.pp > 1 else []
    words += ["sequence"] if layout.sequence_parallel else []
    words += [f"zero={layout.zero_stage}"] if layout.dp > 1 else []
    words += [f"accumulate={config.accumulation_steps}"] if config.accumulation_steps > 1 else []
    words += [f"recompute={config.train.recompute}"] if config.train.recompute != "none" else []
    words += [config.optimizer.name] if config.optimizer.name != "adamw" else []
    words += ["compile"] if config.train.compile else []
    words += ["tied"] if config.model.tie_embeddings else []
    words += ["dropout"] if config.model.dropout else []
    return " ".join(words)


def ragged_batches(config: RunConfig, steps: int = STEPS) -> list[MicroBatch]:
    """Global batches of random tokens that count very unevenly, a function of the configuration alone.

    Rows are made of documents of many lengths, some of which count in no loss. In the first step the last
    data-parallel rank has no token that counts; in the second nothing counts behind the first quarter of the sequence.
    """
    generator = np.random.default_rng(config.seed)
    rows, seq = config.train.global_batch_size, config.seq_length
    batches = []
    for step in range(steps):
        tokens = generator.integers(0, config.model.vocabulary, (rows, seq + 1))
        labels = tokens[:, 1:].copy()
        for row in labels:
            start = 0
            while start < seq:
                end = start + int(generator.integers(1, seq + 1))
                row[start if generator.random() < 0.4 else end - 1 : end] = IGNORED_LABEL
                start = end
        labels[0, 0] = tokens[0, 1]
        if step == 0 and config.parallel.dp > 1:
            for part in local_rows(config, config.parallel.dp - 1):
                labels[part] = IGNORED_LABEL
        if step == 1:
            labels[:, -(-seq // 4) :] = IGNORED_LABEL
        batches.append(MicroBatch(tokens[:, :-1].copy(), labels, [], np.arange(step * rows, (step + 1) * rows)))
    return batches


def local_rows(config: RunConfig, dp_rank: int) -> list[slice]:
    """The samples of a global batch that a rank takes, by micro-batch, as `data.batches.BatchReader` deals them."""
    micro = config.micro_batch_size
    starts = range(dp_rank * micro, config.train.global_batch_size, config.parallel.dp * micro)
    return [slice(start, start + micro) for start in starts]


def parity_rank(rank: int, world_size: int, config: RunConfig, batches: Sequence[MicroBatch]) -> Trajectory:  # noqa: ARG001
    """`run_layout`, as `run_ranks` calls it."""
    return run_layout(config, batches)


def run_layout(config: RunConfig, batches: Sequence[MicroBatch]) -> Trajectory:
    """Take an optimizer step with each global batch, as a training run does; whole tensors are on rank 0 alone.

    Collective, in a process group of the configuration's `world_size` ranks on CPU. The learning rate stays at its
    peak.
    """
    device = torch.device("cpu")
    mesh = ParallelMesh(config.parallel, device.type)
    compile_layers = decide_compilation(config, device.type).layers
    data_parallel = assemble(config, mesh, device, compile_layers=compile_layers)
    model = data_parallel.model
    materialize(model, config.seed, device)
    optimizer = build_optimizer(model, config.optimizer)
    loss_scale = build_loss_scale(config.train, device)
    train_step = TrainStep(data_parallel, optimizer, mesh, config.optimizer.clip_grad, device, loss_scale)
    faults: list[str] = []
    gather = partial(_gather, logical_shapes(build_meta_model(config.model, torch.float64)), faults)
    parameters = list(model.named_parameters())
    initial_weights = gather("initial weight", parameters)
    steps = []
    for number, batch in enumerate(batches, start=1):
        share = [
            MicroBatch(batch.input_ids[rows], batch.labels[rows], [], batch.sample_indices[rows])
            for rows in local_rows(config, mesh.dp_rank)
        ]
        accumulated = train_step.accumulate(share)
        found = [(name, parameter.grad) for name, parameter in parameters if parameter.grad is not None]
        gradients = gather(f"step {number}: gradient", found)
        result = train_step.update(number, accumulated, share, config.optimizer.lr)
        loss, gradient_norm = result.numbers.read()
        steps.append(StepRecord(loss, gradient_norm, gradients))
    weights = gather(f"after step {len(batches)}: weight", parameters)
    return Trajectory(initial_weights, steps, weights, faults)


def _gather(
    shapes: Mapping[str, torch.Size], faults: list[str], kind: str, tensors: Sequence[tuple[str, torch.Tensor]]
) -> dict[str, Array]:
    """Whole tensors on rank 0, where what is wrong with them is added to `faults`; nothing elsewhere. Collective."""
    own: list[tuple[str, Box, Array]] = []
    for name, tensor in tensors:
        box = local_box(tensor, shapes[name])
        own.append((name, box, local_values(tensor, box).double().numpy()))
    everyone = [own] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, everyone)
    if everyone is None:
        return {}
    pieces: dict[str, list[tuple[Box, Array]]] = {name: [] for name in shapes}
    for name, box, values in [held for parts in everyone for held in parts]:
        pieces[name].append((box, values))
    whole: dict[str, Array] = {}
    for name, shape in shapes.items():
        whole[name], found = put_together(tuple(shape), pieces[name])
        faults += [f"{kind} of {name}: {fault}" for fault in found]
    return whole


def put_together(shape: tuple[int, ...], pieces: Iterable[tuple[Box, Array]]) -> tuple[Array, list[str]]:
    """A whole tensor from the pieces that ranks hold, NaN where none does, and what is wrong with them.

    Pieces may overlap where they agree bit for bit.
    """
    whole, known = np.full(shape, np.nan), np.zeros(shape, dtype=np.bool_)
    faults = []
    for box, values in pieces:
        earlier, seen = whole[box.slices], known[box.slices]
        if (seen & (earlier.view(np.uint64) != values.view(np.uint64))).any():
            faults.append("replicas differ")
        whole[box.slices] = np.where(seen, earlier, values)
        known[box.slices] = True
    if not known.all():
        faults.append(f"no rank holds {known.size - np.count_nonzero(known)} of {known.size} elements")
    return whole, sorted(set(faults))


def compare(reference: Trajectory, found: Trajectory, limit: float = LIMIT) -> Comparison:
    """Hold a layout's trajectory against one process'.

    A loss or norm differs by its relative error; a gradient by max|a-b| / max(max|b|, 1e-3 * global gradient norm); a
    weight by max|a-b| / max(1, max|b|). Initial weights are equal bit for bit. The gradient named is the worst of the
    first step in which one is beyond the limit: what follows is its consequence.
    """
    pairs = list(zip(reference.steps, found.steps, strict=True))
    loss = max(_error(step.loss, right.loss, 0.0) for right, step in pairs)
    gradient_norm = max(_error(step.gradient_norm, right.gradient_norm, 0.0) for right, step in pairs)
    worst, beyond = (0.0, ""), []
    for number, (right, step) in enumerate(pairs, start=1):
        errors = _errors(step.gradients, right.gradients, GRADIENT_FLOOR * right.gradient_norm)
        worst = max(worst, errors[0])
        beyond = [f"step {number}: gradient of {name} is off by {error:.1e}" for error, name in errors if error > limit]
        if beyond:
            break
    weight, weight_name = _errors(found.weights, reference.weights, 1.0)[0]
    problems = _first_of(found.faults) + _initial_problems(reference.initial_weights, found.initial_weights)
    problems += [f"loss is off by {loss:.1e}"] if loss > limit else []
    problems += _first_of(beyond)
    problems += [f"gradient norm is off by {gradient_norm:.1e}"] if gradient_norm > limit else []
    problems += [f"weight {weight_name} is off by {weight:.1e}"] if weight > limit else []
    return Comparison(loss, *worst, gradient_norm, weight, weight_name, tuple(problems))


def _initial_problems(reference: Mapping[str, Array], found: Mapping[str, Array]) -> list[str]:
    if reference.keys() != found.keys():
        return [f"parameters differ: {', '.join(sorted(reference.keys() ^ found.keys()))}"]
    differing = [name for name in reference if reference[name].tobytes() != found[name].tobytes()]
    return _first_of([f"initial weight of {name} differs" for name in differing])


def _first_of(problems: Sequence[str]) -> list[str]:
    """The first of a kind, and how many more there are."""
    return [*problems[:1], *([f"and {len(problems) - 1} more like it"] if problems[1:] else [])]


def _errors(found: Mapping[str, Array], reference: Mapping[str, Array], floor: float) -> list[tuple[float, str]]:
    """What each tensor is off by, the worst first."""
    return sorted(((_error(found.get(name), one, floor), name) for name, one in reference.items()), reverse=True)


def _error(values: Array | float | None, reference: Array | float, floor: float) -> float:
    """max|a-b| / max(max|b|, floor); infinite where shapes differ or something is not finite."""
    if values is None or np.shape(values) != np.shape(reference):
        return math.inf
    scale = max(float(np.abs(reference).max()), floor)
    error = float(np.abs(values - reference).max()) / scale if scale else math.inf
    return math.inf if math.isnan(error) else error  # NaN compares with nothing, so that it would pass for equal
