"""All rules between settings: each is a small function that says what is wrong, why, and what works."""

from collections.abc import Callable, Iterator
from itertools import chain

from settings.checks.batch import check_batch, check_batch_memory
from settings.checks.files import check_checkpoint, check_name
from settings.checks.layout import (
    check_tensor_ffn,
    check_tensor_groups,
    check_tensor_heads,
    check_tensor_sequence,
    check_world,
)
from settings.checks.model import check_heads, check_positions, check_rotary, check_rotary_scaling
from settings.checks.pipeline import (
    check_pipeline_batch,
    check_pipeline_options,
    check_pipeline_settings,
    check_stages,
    check_virtual_stages,
)
from settings.checks.training import check_float32, check_parameter_groups, check_profile, check_schedule, check_split
from settings.config import RunConfig

RELATIONS: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    check_name,
    check_heads,
    check_rotary,
    check_rotary_scaling,
    check_positions,
    check_world,
    check_tensor_heads,
    check_tensor_groups,
    check_tensor_ffn,
    check_tensor_sequence,
    check_batch,
    check_batch_memory,
    check_pipeline_settings,
    check_virtual_stages,
    check_stages,
    check_pipeline_batch,
    check_pipeline_options,
    check_parameter_groups,
    check_float32,
    check_schedule,
    check_profile,
    check_split,
    check_checkpoint,
)
"""The rules between settings; they hold no meaning where `check_ranges` found something."""


def check_relations(config: RunConfig) -> Iterator[str]:
    """What every rule of RELATIONS finds."""
    return chain.from_iterable(rule(config) for rule in RELATIONS)
