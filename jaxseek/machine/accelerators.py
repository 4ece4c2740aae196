"""Accelerators in this machine and the packages that drive them, found without importing JAX.

JAX computes on the CPU, without an error, where the package for an accelerator is missing or belongs to
another release. `unused_accelerator` finds that out from the operating system's files and the metadata of
installed packages, which takes a millisecond, and says what to install.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_GOOGLE, _NVIDIA = "0x1ae0", "0x10de"
# PCI device ids of Google's chips. Its network and disk devices on Google Cloud have the same vendor.
_TPU_NAMES = {
    "0x0027": "v2 or v3",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "7x",
    "0x0083": "8i",
    "0x007c": "8t",
}
_ACCELERATOR_CLASS, _DISPLAY_CLASS = "0x12", "0x03"  # first byte of a PCI class
CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
# Releases of libtpu with wrong results, by their first three numbers.
BAD_LIBTPU: dict[tuple[int, ...], str] = {
    (0, 0, 42): "gradients of gathers outside jax.jit are wrong (jax issue 39025)",
    (0, 0, 48): "gradients of a sharded embedding accumulated in a scan are wrong (openxla/xla issue 49143)",
}


@dataclass(frozen=True)
class Accelerator:
    """Chips of one kind; `devices` are the files by which a process reaches them."""

    kind: str  # tpu or gpu
    count: int
    name: str
    devices: tuple[Path, ...]

    def __str__(self) -> str:
        noun = ("chip" if self.kind == "tpu" else "GPU") + ("" if self.count == 1 else "s")
        return f"{self.count} {self.name} {noun}"


def find_accelerators(root: Path = Path("/")) -> list[Accelerator]:
    """TPU chips and NVIDIA GPUs of the machine whose file system begins at `root`, usable or not."""
    found = []
    pci = list(_pci_devices(root))
    accel, vfio = _files(root, "dev", r"accel\d+"), _files(root, "dev/vfio", r"\d+")
    chips = [
        d for d in pci if d[0] == _GOOGLE and (d[1] in _TPU_NAMES or d[2].startswith(_ACCELERATOR_CLASS))
    ]
    if chips or accel:  # a container may hide /sys
        name = f"TPU {_TPU_NAMES.get(chips[0][1], '')}".strip() if chips else "TPU"
        found.append(Accelerator("tpu", len(chips or accel), name, accel or vfio))
    cards = [d for d in pci if d[0] == _NVIDIA and d[2].startswith(_DISPLAY_CLASS)]
    files, driven = _files(root, "dev", r"nvidia\d+"), _files(root, "proc/driver/nvidia/gpus", r".+")
    if count := len(files or driven or cards):
        found.append(Accelerator("gpu", count, "NVIDIA", files))
    return found


def unused_accelerator(
    accelerators: list[Accelerator] | None = None,
    backend: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> tuple[str, str] | None:
    """Which accelerator JAX leaves unused and why, and the command that mends it; or None.

    `backend` is what JAX computes on, where that is known already. A user who set JAX_PLATFORMS=cpu, or hid
    the GPUs by CUDA_VISIBLE_DEVICES, has chosen, and gets None.
    """
    if environment.get("JAX_PLATFORMS", "").startswith("cpu") or backend not in (None, "cpu"):
        return None
    for accelerator in find_accelerators() if accelerators is None else accelerators:
        if accelerator.kind == "gpu" and environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            continue
        why, mend = driver_problem(accelerator) or ("", "")
        if backend and not why:
            why, mend = "it could not start the accelerator", "jaxseek doctor"
        if why:
            then = "computes" if backend else "would compute"
            return f"{accelerator} here, but JAX {then} on the CPU: {why}", mend
    return None


def driver_problem(accelerator: Accelerator) -> tuple[str, str] | None:
    """Why the packages here cannot drive it, and the command that mends it; None where they should."""
    jax = installed("jax") or ""
    if accelerator.kind == "tpu":
        release = good_release_for_tpu(jax)
        mend = f"pip install 'jax[tpu]=={release}'" if release else "pip install 'jax[tpu]'"
        libtpu, expected = installed("libtpu"), expected_libtpu()
        if libtpu is None:
            return "libtpu is not installed", mend
        if expected and numbers(libtpu) < numbers(expected):
            return f"libtpu {libtpu} is older than jax {jax} expects ({expected})", mend
        return _unreachable(accelerator)
    plugins = {name: version for name in CUDA_PLUGINS if (version := installed(name))}
    cuda = next((name.split("-")[1] for name in plugins), "cuda12")
    mend = f"pip install 'jax[{cuda}]=={jax}'" if jax else "pip install 'jax[cuda12]'"
    if not accelerator.devices:
        return (
            "its driver is not loaded (no /dev/nvidia0)",
            "install NVIDIA's driver, or docker run --gpus all",
        )
    if not plugins:
        return "JAX's CUDA plugin is not installed", mend
    jaxlib = installed("jaxlib") or ""
    for name, version in plugins.items():
        if numbers(version) != numbers(jaxlib):
            return f"{name} {version} is not used with jaxlib {jaxlib}", mend
    return _unreachable(accelerator)


def _unreachable(accelerator: Accelerator) -> tuple[str, str] | None:
    closed = [p for p in accelerator.devices if not os.access(p, os.R_OK | os.W_OK)]
    return (f"no permission for {closed[0]}", f"sudo chmod a+rw {closed[0]}") if closed else None


def good_release_for_tpu(jax: str) -> str:
    """The installed release of jax, or the nearest one here whose libtpu is not in BAD_LIBTPU."""
    bad: dict[tuple[int, ...], str] = {(0, 10, 2): "0.10.1", (0, 11, 2): "0.12.0"}
    return bad.get(numbers(jax)[:3], jax)


def expected_libtpu() -> str | None:
    """The libtpu that the installed jax names for its tpu extra, without the last `.*`; None if none."""
    try:
        requirements = importlib.metadata.requires("jax") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (re.match(r"libtpu\s*==\s*([\d.]+?)(\.\*)?\s*;", line) for line in requirements)
    return next((match[1] for match in found if match), None)


def installed(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """The release numbers of a version, for comparing: 0.10.2.dev1 is (0, 10, 2)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def holders(accelerator: Accelerator, root: Path = Path("/")) -> dict[int, str]:
    """Other processes that have the accelerator's files open, and their commands; as root, all users'."""
    files = {str(p) for p in accelerator.devices}
    found = {}
    for process in sorted((root / "proc").glob("[0-9]*")):
        try:
            if any(os.readlink(fd) in files for fd in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(process.name)] = command.strip()
        except OSError:  # ended meanwhile, or another user's
            continue
    found.pop(os.getpid() if root == Path("/") else -1, None)
    return found


def _pci_devices(root: Path) -> Iterator[tuple[str, str, str]]:
    """Vendor, device and class of the first function of every PCI device."""
    for folder in sorted((root / "sys/bus/pci/devices").glob("*.0")):
        try:
            vendor, device, kind = ((folder / n).read_text().strip() for n in ("vendor", "device", "class"))
        except OSError:
            continue
        yield vendor, device, kind


def _files(root: Path, folder: str, pattern: str) -> tuple[Path, ...]:
    try:
        names = sorted(p.name for p in (root / folder).iterdir())
    except OSError:
        return ()
    return tuple(root / folder / name for name in names if re.fullmatch(pattern, name))
