"""What the hardware can do at best: peaks per device, each with the source of its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Precision(StrEnum):
    """How numbers are stored; int8 and int4 weights are multiplied in bf16."""

    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


class UnknownDevice(ValueError):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator: data-sheet peaks, never efficiencies."""

    name: str
    bf16_flops: float
    fp8_flops: float
    """Equal to bf16_flops where the device has no 8-bit floating point."""
    memory_bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    """To a device of the same host, one direction."""
    network_bytes_per_s: float
    """To another host, one direction, per device."""
    cores: int
    """Units that work independently (streaming multiprocessors, AI cores)."""
    gemm_tile_tokens: int
    """Rows of the tile that a matrix product is padded to."""
    source: str
    nominal: bool = False
    """The numbers describe a typical machine of this kind, not a product."""

    def flops(self, precision: Precision) -> float:
        return self.fp8_flops if precision is Precision.FP8 else self.bf16_flops


_SHEET = "data sheet, as listed by AIConfigurator 0.12 ({}, Apache-2.0)"

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            name="h100",
            bf16_flops=989e12,
            fp8_flops=1978e12,
            memory_bytes_per_s=3.35e12,
            memory_bytes=85_899_345_920,
            link_bytes_per_s=450e9,
            network_bytes_per_s=50e9,
            cores=132,
            gemm_tile_tokens=128,
            source=_SHEET.format("h100_sxm.yaml"),
        ),
        Device(
            name="h200",
            bf16_flops=989e12,
            fp8_flops=1978e12,
            memory_bytes_per_s=4.8e12,
            memory_bytes=151_397_597_184,
            link_bytes_per_s=450e9,
            network_bytes_per_s=50e9,
            cores=132,
            gemm_tile_tokens=128,
            source=_SHEET.format("h200_sxm.yaml"),
        ),
        Device(
            name="a100",
            bf16_flops=312e12,
            fp8_flops=312e12,
            memory_bytes_per_s=2.039e12,
            memory_bytes=85_899_345_920,
            link_bytes_per_s=300e9,
            network_bytes_per_s=25e9,
            cores=108,
            gemm_tile_tokens=128,
            source=_SHEET.format("a100_sxm.yaml"),
        ),
        Device(
            name="l40s",
            bf16_flops=362.05e12,
            fp8_flops=733e12,
            memory_bytes_per_s=864e9,
            memory_bytes=48_305_799_168,
            link_bytes_per_s=32e9,
            network_bytes_per_s=50e9,
            cores=142,
            gemm_tile_tokens=128,
            source=_SHEET.format("l40s.yaml"),
        ),
        Device(
            name="b200",
            bf16_flops=2250e12,
            fp8_flops=4500e12,
            memory_bytes_per_s=7.7e12,
            memory_bytes=193_273_528_320,
            link_bytes_per_s=900e9,
            network_bytes_per_s=100e9,
            cores=148,
            gemm_tile_tokens=128,
            source=_SHEET.format("b200_sxm.yaml"),
        ),
        Device(
            name="ascend-910b",
            bf16_flops=390e12,
            fp8_flops=390e12,
            memory_bytes_per_s=1.6e12,
            memory_bytes=64 * 2**30,
            link_bytes_per_s=10e9,
            network_bytes_per_s=10e9,
            cores=24,
            gemm_tile_tokens=16,
            source="constants of xLLM's scheduler (pd_ooc_scheduler.cpp, perf_model.cpp): "
            "390 TFLOP/s, 1600 GB/s, 10 GB/s; 64 GiB is the product's size",
        ),
        Device(
            name="cpu",
            bf16_flops=5e12,
            fp8_flops=5e12,
            memory_bytes_per_s=400e9,
            memory_bytes=32 * 2**30,
            link_bytes_per_s=50e9,
            network_bytes_per_s=1.25e9,
            cores=1,
            gemm_tile_tokens=1,
            source="a round figure for a large server, of which few get much; calibrate before use",
            nominal=True,
        ),
    )
}


def device_named(name: str) -> Device:
    """Finds a device by its name, or by a longer one such as 'NVIDIA H100 80GB HBM3'."""
    wanted = name.lower().replace("_", "-")
    if wanted in DEVICES:
        return DEVICES[wanted]
    words = set(wanted.replace("-", " ").split())
    for key, device in DEVICES.items():
        if key in words or key in wanted.split("-"):
            return device
    if "910b" in wanted:
        return DEVICES["ascend-910b"]
    raise UnknownDevice(f"unknown device {name!r}, expected one of {sorted(DEVICES)}")
