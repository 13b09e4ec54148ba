"""`kilotron timeline`: a pipeline schedule as it is executed, drawn, with its idle time beside theory."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from parallel.schedule_timeline import Action, as_text, bubble, ideal_bubble, most_in_flight, peak_in_flight, simulate
from runtime.errors import ConfigError
from settings.compose import compose
from settings.config import CheckpointConfig, RunConfig
from settings.resolve import resolve

VOCABULARY, WIDTH, LENGTH = 16, 8, 4
MOST_RANKS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `kilotron timeline`."""
    parser.add_argument(
        "overrides",
        nargs="+",
        metavar="KEY=VALUE",
        help="as for pretrain_gpt.py; parallel.pp, pp_schedule and virtual_stages count here, nothing else does",
    )
    parser.add_argument("--microbatches", type=int, help="micro-batches a step; default: two a rank")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/timeline.png"), help="the picture; default: %(default)s"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the timeline and writes its picture. Raises ConfigError."""
    if arguments.output.suffix != ".png":
        raise ConfigError(f"--output {arguments.output}: a picture is PNG; try {arguments.output.with_suffix('.png')}")
    try:
        config = small_run(compose(arguments.overrides), arguments.microbatches)
    except ConfigError as error:
        # What the batch is in a run, micro-batches are here.
        raise ConfigError(str(error).replace("train.global_batch_size=", "--microbatches ")) from error
    layout, micro_batches = config.parallel, config.accumulation_steps

    # Only now, so that a configuration is refused before torch takes its seconds to load.
    from monitoring.plot import draw_timeline
    from verification.local_ranks import run_ranks

    orders = run_ranks(layout.pp, executed_order, config)
    spans = simulate(orders, layout.stages)
    idle = bubble(spans, layout.pp)
    ideal = ideal_bubble(layout.pp_schedule, layout.pp, layout.stages_per_rank, micro_batches)
    theory = "no formula below two micro-batches a rank" if ideal is None else f"in theory {ideal:.1%}"
    each = layout.pp_schedule, layout.pp
    kept = [peak_in_flight(spans, rank) for rank in range(layout.pp)]
    bounds = [most_in_flight(*each, rank, layout.stages_per_rank, micro_batches) for rank in range(layout.pp)]
    title = f"{layout.pp_schedule}, {layout.pp} ranks, {layout.stages} stages, {micro_batches} micro-batches"
    print(as_text(spans, layout.pp, layout.stages))
    print("F forward, B backward, I and W its gradients of inputs and of weights; small letters: a rank's other stage")
    print(f"{title}; stages cost alike, whatever the model, and a backward pass takes as long as two forward passes")
    print(f"idle        {idle:.1%} of the time that ranks work; {theory}")
    print(f"in flight   {kept} micro-batches of a stage kept at most, by rank; the schedule promises {bounds}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_bytes(draw_timeline(spans, layout.pp, f"{title}: idle {idle:.1%}", "forward passes"))
    print(f"picture     {arguments.output}")
    return 0


def small_run(config: RunConfig, micro_batches: int | None) -> RunConfig:
    """The pipeline of a configuration alone, with one small layer a stage. Raises ConfigError."""
    layout = config.parallel
    if not 1 < layout.pp <= MOST_RANKS:
        raise ConfigError(f"parallel.pp={layout.pp}: say how many ranks the pipeline has, 2 to {MOST_RANKS}")
    layout = replace(layout, tp=1, cp=1, ep=1, dp_replicate=1, dp_shard=1, layers_per_stage=None, zero=None)
    model = replace(
        config.model,
        num_layers=layout.stages, hidden_size=WIDTH, num_attention_heads=1, num_query_groups=None, head_dim=None,
        ffn_hidden_size=WIDTH, vocab_size=VOCABULARY, max_position_embeddings=LENGTH,
    )  # fmt: skip
    train = replace(
        config.train, micro_batch_size=1, global_batch_size=2 * layout.pp if micro_batches is None else micro_batches,
        batch_schedule=None, precision="fp32", compile=False,
    )  # fmt: skip
    data = replace(config.data, path=None, corpus="sample", tokenizer="bytes", seq_length=LENGTH)
    alone = replace(
        config, world_size=layout.pp, model=replace(model, vocab_size=None), parallel=layout, train=train, data=data,
        checkpoint=CheckpointConfig(),
    )  # fmt: skip
    return replace(resolve(alone, {}), model=model)


def executed_order(rank: int, world_size: int, config: RunConfig) -> list[Action]:  # noqa: ARG001
    """What a rank does in a step, in the order in which it does."""
    import torch

    from parallel.initialization import materialize
    from parallel.mesh import ParallelMesh
    from parallel.pipeline import Pipeline
    from training.build import assemble

    device = torch.device("cpu")
    pipeline = assemble(config, ParallelMesh(config.parallel, "cpu"), device)
    if not isinstance(pipeline, Pipeline):
        raise TypeError("there is one stage")
    materialize(pipeline.model, 0, device)
    actions: list[Action] = []

    @contextmanager
    def observe(action: Action) -> Iterator[None]:
        actions.append(action)
        yield

    pipeline.observer = observe
    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    batch = ids, {"labels": ids, "sample_indices": ids[:, 0]}
    pipeline.forward_backward([batch] * config.accumulation_steps, lambda loss: loss)
    return actions
