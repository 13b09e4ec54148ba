"""Peaks by device name, and the share of them that a model uses."""

import pytest

import monitoring.throughput
from core.flops import flops_per_token
from monitoring.throughput import PEAK_TERAFLOPS, model_flops_utilization, peak_flops
from settings.compose import compose
from settings.resolve import resolve


@pytest.mark.parametrize(
    ("device", "bf16"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("Tesla V100-SXM2-16GB", None),
        ("Tesla T4", None),
        # Names that begin like another's, and parts of a device.
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM2e", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI250X/MI250", None),
        ("NVIDIA H20", None),
        ("CPU", None),
        ("", None),
    ],
)
def test_a_peak_is_known_or_not_named(device, bf16):
    assert peak_flops(device, "bf16") == bf16


def test_the_peak_is_that_of_the_precision():
    found = {precision: peak_flops("Tesla V100-SXM2-32GB", precision) for precision in ("fp16", "bf16", "fp32")}
    assert found == {"fp16": 125e12, "bf16": None, "fp32": 15.7e12}
    assert peak_flops("NVIDIA H100 80GB HBM3", "tf32") == 494.7e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp64") is None
    for row in PEAK_TERAFLOPS.values():
        assert row.get("bf16", row["fp16"]) == row["fp16"] > row.get("tf32", 0) >= row.get("fp32", 0) * 0.99 or (
            "tf32" not in row
        )


def test_the_share_is_of_all_ranks(monkeypatch):
    monkeypatch.setitem(PEAK_TERAFLOPS, "abacus", {"bf16": 3.0})
    config = resolve(compose(["train.precision=bf16", "world_size=4", "model=gpt2_small", "data.seq_length=512"]), {})
    needed = flops_per_token(config.model, 512)
    found = model_flops_utilization(config, tokens_per_second=3e12 / needed, device="NVIDIA Abacus")
    assert found == pytest.approx(1 / 4)
    assert model_flops_utilization(config, 1.0, "CPU") is None


def test_no_cpu_has_a_peak():
    assert all(monitoring.throughput.peak_flops("CPU", precision) is None for precision in ("fp32", "bf16", "fp64"))
