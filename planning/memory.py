"""Bytes per number and per parameter of weights, gradients and optimizer state."""

from parallel.stages import build_stages, stages_of_rank
from settings.config import RunConfig


def number_bytes(config: RunConfig) -> int:
    """Bytes of a weight as the optimizer holds it, of its gradient, and of each moment."""
    return 8 if config.train.precision == "fp64" else 4


def optimizer_numbers(config: RunConfig) -> int:
    """Numbers that the optimizer keeps of all parameters: AdamW two of each, Muon one of each that it moves."""
    by_muon = config.model.matrix_parameters() if config.optimizer.name == "muon" else 0
    return 2 * config.model.parameter_count() - by_muon


def state_bytes(config: RunConfig) -> int:
    """Bytes a rank holds of weights, gradients and optimizer state, cut over pp, tp and dp_shard: float32 numbers,
    float64 under fp64; of the pipeline rank that holds most. A rank with the most of a weight that dp_shard cuts
    unevenly holds up to a row more."""
    layout, model = config.parallel, config.model
    stages, most = build_stages(config.layers_per_stage), 0
    for rank in range(layout.pp):
        own = [stages[index] for index in stages_of_rank(rank, layout.pp, layout.stages_per_rank, layout.pp_schedule)]
        parameters = sum(
            model.stage_parameters(len(stage.layers), is_first=stage.is_first, is_last=stage.is_last, tp=layout.tp)
            for stage in own
        )
        if layout.pp == 1:
            parameters = model.parameter_count(layout.tp)
        layers = sum(len(stage.layers) for stage in own)
        matrices = model.matrix_parameters(layout.tp) // model.num_layers * layers
        most = max(most, 4 * parameters - (matrices if config.optimizer.name == "muon" else 0))
    return number_bytes(config) * -(-most // layout.dp_shard)
