"""TPU chips and slices: memory, peak rates, links and clocks, from published figures and the compiler.

All figures are per *chip*. A chip may be two JAX devices (`Chip.devices`); `Chip.device` gives one device's
share.

Sources:
[docs] docs.cloud.google.com/tpu/docs, the pages v4, v5e, v5p, v6e, tpu7x (read in November 2026).
[book] jax-ml.github.io/scaling-book/tpus: achieved bandwidth of one link in one direction, time per hop,
which axes wrap around.
[compiler] libtpu 0.0.52, probed with small programs: VMEM, the part of it that a Pallas kernel gets
(`scoped_vmem`, as the compiler's out-of-memory errors name them), and `operation_cycles`, its estimate for
adding 1 to an 8 x 128 array.

Clock: peak / (multiply-adds per cycle of the matrix units * 2); for v5e, 197e12 / (4 * 128 * 128 * 2) = 1.50
GHz. docs/lab.md shows what a large matmul compiles to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jaxseek.config.model import ConfigError

HOP_SECONDS = 1e-6  # [book], "Key takeaways": about 1 us per hop


@dataclass(frozen=True)
class Chip:
    """A TPU chip: HBM in bytes and bytes/s, peak operations/s by dtype, ICI bytes/s per link and direction.

    `usable` is the HBM that the compiler gives to a program, `vmem` the VMEM of one core in bytes and
    `scoped_vmem` the part that a kernel gets unless it asks for more. `operation_cycles` is the compiler's
    estimate for the smallest operation; `kinds` are JAX's `device_kind` names. `torus` is the number of ICI
    axes; an axis wraps around if its size is a multiple of `wraps_at`.
    """

    name: str
    hbm: int
    usable: int
    hbm_bandwidth: float
    peak: dict[str, float]
    link_bandwidth: float
    torus: int
    wraps_at: int
    clock: float
    vmem: int
    scoped_vmem: int
    operation_cycles: int
    kinds: tuple[str, ...]
    devices: int = 1
    config: str = ""  # libtpu's chip configuration, if JAX does not run the chip in the default one

    @property
    def device(self) -> Chip:
        """One JAX device's share of the chip's memory and compute; link figures stay per chip."""
        n = self.devices
        peak = {dtype: flops / n for dtype, flops in self.peak.items()}
        parts = {"hbm": self.hbm // n, "usable": self.usable // n, "hbm_bandwidth": self.hbm_bandwidth / n}
        return replace(self, **parts, peak=peak, devices=1)


_GIB, _MIB = 2**30, 2**20

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4",
            hbm=32 * _GIB,  # [docs]
            usable=int(31.25 * _GIB),
            hbm_bandwidth=1.2e12,  # [docs]
            peak={"bf16": 275e12, "int8": 275e12, "fp8": 275e12},  # [docs]; no FP8 unit
            link_bandwidth=4.5e10,  # [book]; [docs]: 300 GB/s bidirectional over 6 links
            torus=3,  # [docs]
            wraps_at=4,  # [book]: optical switches close every axis of whole 4x4x4 cubes
            clock=1.05e9,  # 275e12 / (2 cores * 4 * 128 * 128 * 2)
            vmem=16 * _MIB,  # [compiler]
            scoped_vmem=16 * _MIB,  # [compiler]
            operation_cycles=618,  # [compiler]
            kinds=("TPU v4",),
            config="megacore",  # both cores are one device
        ),
        Chip(
            "v5e",
            hbm=16 * _GIB,  # [docs]
            usable=int(15.75 * _GIB),  # as named in XLA's out-of-memory error
            hbm_bandwidth=8.19e11,  # [docs]
            peak={"bf16": 197e12, "int8": 394e12, "fp8": 197e12},  # [docs]; no FP8 unit
            link_bandwidth=4.5e10,  # [book]; [docs]: 400 GB/s bidirectional over 4 links
            torus=2,  # [docs]
            wraps_at=16,  # [book]: 2D slices wrap around only along an axis of 16
            clock=1.5e9,
            vmem=128 * _MIB,  # [compiler]
            scoped_vmem=16 * _MIB,  # [compiler]
            operation_cycles=1832,  # [compiler]
            kinds=("TPU v5 lite", "TPU v5e"),
        ),
        Chip(
            "v5p",
            hbm=95 * _GIB,  # [docs]
            usable=int(95.74 * _GIB),
            hbm_bandwidth=2.765e12,  # [docs]
            peak={"bf16": 459e12, "int8": 918e12, "fp8": 459e12},  # [docs]; no FP8 unit
            link_bandwidth=9e10,  # [book]; [docs]: 1200 GB/s bidirectional over 6 links
            torus=3,  # [docs]
            wraps_at=4,  # [book]
            clock=1.75e9,  # 459e12 / (2 cores * 4 * 128 * 128 * 2)
            vmem=64 * _MIB,  # [compiler]
            scoped_vmem=16 * _MIB,  # [compiler]
            operation_cycles=2128,  # [compiler]
            kinds=("TPU v5", "TPU v5p"),
        ),
        Chip(
            "v6e",
            hbm=32 * _GIB,  # [docs]
            usable=int(31.25 * _GIB),
            hbm_bandwidth=1.638e12,  # [docs]
            peak={"bf16": 918e12, "int8": 1836e12, "fp8": 918e12},  # [docs]
            link_bandwidth=9e10,  # [book]; [docs]: 800 GB/s bidirectional over 4 links
            torus=2,  # [docs]
            wraps_at=16,  # [book]
            clock=1.75e9,  # 918e12 / (4 * 256 * 256 * 2)
            vmem=128 * _MIB,  # [compiler]
            scoped_vmem=32 * _MIB,  # [compiler]
            operation_cycles=2124,  # [compiler]
            kinds=("TPU v6 lite", "TPU v6e"),
        ),
        Chip(
            "tpu7x",  # Ironwood
            hbm=192 * _GIB,  # [docs]
            usable=int(189.5 * _GIB),
            hbm_bandwidth=7.38e12,  # [docs]
            peak={"bf16": 2307e12, "int8": 2307e12, "fp8": 4614e12},  # [docs]; no int8 figure there
            link_bandwidth=9e10,  # [docs]: 1200 GB/s bidirectional over 6 links, as v5p
            torus=3,  # [docs]
            wraps_at=4,  # as v5p
            clock=2.2e9,  # 2307e12 / (2 chiplets * 4 * 256 * 256 * 2)
            vmem=64 * _MIB,  # [compiler]
            scoped_vmem=32 * _MIB,  # [compiler]
            operation_cycles=2300,  # [compiler]
            kinds=("TPU7x",),
            devices=2,  # [docs]: two chiplets, one JAX device each
        ),
    )
}

LARGEST = 16_384  # chips of a slice; the largest pod has 9,216


def chip_of(device_kind: str) -> Chip | None:
    """Look up a chip by JAX's `device_kind`; None if it is not in CHIPS."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


@dataclass(frozen=True)
class Topology:
    """A TPU slice: the chip and the size of each torus axis, such as v5e:8x8."""

    chip: Chip
    dims: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.dims))}"

    @property
    def num_devices(self) -> int:
        return math.prod(self.dims) * self.chip.devices

    def wraps(self, axis: int) -> bool:
        """Return True if the links of this torus axis close into a ring."""
        return self.dims[axis] % self.chip.wraps_at == 0

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Parse `CHIP:AxB` or `CHIP:AxBxC`. Raises ConfigError for an unknown chip or wrong axes."""
        name, _, sizes = text.partition(":")
        name = {"ironwood": "tpu7x", "v5litepod": "v5e"}.get(name, name)
        if name not in CHIPS:
            raise ConfigError(f"topology {text!r}: unknown chip {name!r}; known: {', '.join(CHIPS)}")
        chip, parts = CHIPS[name], sizes.split("x")
        if len(parts) != chip.torus or not all(p.isdecimal() and int(p) > 0 for p in parts):
            example = "x".join(["4"] * chip.torus)
            raise ConfigError(
                f"topology {text!r}: a {name} slice has {chip.torus} axes, such as {name}:{example}"
            )
        dims = tuple(map(int, parts))
        if math.prod(dims) > LARGEST:
            raise ConfigError(f"topology {text!r}: more than {LARGEST:,} chips, and no pod has as many")
        return cls(chip, dims)
