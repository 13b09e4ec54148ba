"""Peak arithmetic of devices by their name, and the share of it that a model uses."""

import re

import torch

from core.flops import flops_per_token
from training.config import RunConfig

PEAK_TERAFLOPS: dict[str, dict[str, float]] = {
    "v100": {"fp16": 125, "fp32": 15.7},
    "v100 pcie": {"fp16": 112, "fp32": 14},
    "v100s pcie": {"fp16": 130, "fp32": 16.4},
    "t4": {"fp16": 65, "fp32": 8.1},
    "a10": {"fp16": 125, "bf16": 125, "tf32": 62.5, "fp32": 31.2},
    "a30": {"fp16": 165, "bf16": 165, "tf32": 82, "fp32": 10.3},
    "a40": {"fp16": 149.7, "bf16": 149.7, "tf32": 74.8, "fp32": 37.4},
    "a100": {"fp16": 312, "bf16": 312, "tf32": 156, "fp32": 19.5},
    "a100 pcie": {"fp16": 312, "bf16": 312, "tf32": 156, "fp32": 19.5},
    "rtx 3090": {"fp16": 71, "bf16": 71, "tf32": 35.6, "fp32": 35.6},
    "rtx 4090": {"fp16": 165.2, "bf16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "l4": {"fp16": 121, "bf16": 121, "tf32": 60, "fp32": 30.3},
    "l40": {"fp16": 181, "bf16": 181, "tf32": 90.5, "fp32": 90.5},
    "l40s": {"fp16": 362, "bf16": 362, "tf32": 183, "fp32": 91.6},
    "h100": {"fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "h100 pcie": {"fp16": 756, "bf16": 756, "tf32": 378, "fp32": 51.2},
    "h100 nvl": {"fp16": 835.5, "bf16": 835.5, "tf32": 417.5, "fp32": 60},
    "gh200": {"fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "h200": {"fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "h200 nvl": {"fp16": 835.5, "bf16": 835.5, "tf32": 417.5, "fp32": 60},
    "b200": {"fp16": 2250, "bf16": 2250, "tf32": 1125, "fp32": 75},
    "gb200": {"fp16": 2500, "bf16": 2500, "tf32": 1250, "fp32": 80},
    # One of the card's two dies, which is what a process sees.
    "mi250x": {"fp16": 191.5, "bf16": 191.5},
    "mi300x": {"fp16": 1307.4, "bf16": 1307.4, "tf32": 653.7, "fp32": 163.4},
    "mi325x": {"fp16": 1307.4, "bf16": 1307.4, "tf32": 653.7, "fp32": 163.4},
}
"""Teraflops by device and `train.precision`, from the makers' data sheets: dense, summed in float32; fp32 on NVIDIA's
without tensor cores. What is not certain is absent."""

PLAIN_WORDS = re.compile(r"nvidia|tesla|geforce|amd|instinct|sxm[245]|\d+gb|hbm3e?")
"""Words in a device's name that make no difference to its peak. Any other does: `MIG`, `Laptop`, `Ti`."""


def device_name(device: torch.device) -> str:
    """A device as a person calls it: the name of a GPU, or `CPU`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_flops(device: str, precision: str) -> float | None:
    """Floating-point operations a second of a device by its name, as `torch.cuda.get_device_name` has it; None where
    they are not known in `precision`."""
    words = re.split(r"[^a-z0-9]+", device.lower())
    model = " ".join(word for word in words if not PLAIN_WORDS.fullmatch(word))
    teraflops = PEAK_TERAFLOPS.get(model, {}).get(precision)
    return None if teraflops is None else teraflops * 1e12


def model_flops_utilization(config: RunConfig, tokens_per_second: float, device: str) -> float | None:
    """MFU (arXiv:2204.02311): the share, 0 to 1, of the arithmetic of all ranks' devices that the model needs.

    Args:
        config: resolved.
        tokens_per_second: over all ranks.
        device: the name of each rank's device.

    None where the device's peak is not known.
    """
    peak = peak_flops(device, config.train.precision)
    if peak is None:
        return None
    needed = flops_per_token(config.model, config.seq_length) * tokens_per_second
    return needed / (peak * (config.world_size or 1))
