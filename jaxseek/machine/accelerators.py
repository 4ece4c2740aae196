"""Find the accelerators of this machine, and the packages that drive them, without importing JAX.

JAX computes on the CPU, without an error, if the package for an accelerator is missing or belongs to another
release. `unused_accelerator` detects this from the operating system's files and the metadata of installed
packages, which takes a millisecond, and says what to install.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_GOOGLE, _NVIDIA = "0x1ae0", "0x10de"
# PCI device ids of TPU chips. Google Cloud's network and disk devices have the same vendor id.
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
# Releases of libtpu that compute wrong results, by the first three numbers of the version.
BAD_LIBTPU: dict[tuple[int, ...], str] = {
    (0, 0, 42): "gradients of gathers outside jax.jit are wrong (jax issue 39025)",
    (0, 0, 48): "gradients of a sharded embedding accumulated in a scan are wrong (openxla/xla issue 49143)",
}


@dataclass(frozen=True)
class Accelerator:
    """Chips of one kind; `devices` are the device files through which a process opens them."""

    kind: str  # tpu or gpu
    count: int
    name: str
    devices: tuple[Path, ...]

    def __str__(self) -> str:
        noun = ("chip" if self.kind == "tpu" else "GPU") + ("" if self.count == 1 else "s")
        return f"{self.count} {self.name} {noun}"


def find_accelerators(root: Path = Path("/")) -> list[Accelerator]:
    """List TPU chips and NVIDIA GPUs, usable or not, of the machine whose file system is at `root`."""
    found = []
    pci = list(_pci_devices(root))
    accel, vfio = _files(root, "dev", r"accel\d+"), _files(root, "dev/vfio", r"\d+")
    chips = [
        d for d in pci if d[0] == _GOOGLE and (d[1] in _TPU_NAMES or d[2].startswith(_ACCELERATOR_CLASS))
    ]
    if chips or accel:  # containers may hide /sys
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
    """Return (which accelerator JAX leaves unused and why, the command that fixes it), or None.

    `backend` is the platform on which JAX computes, if known already. JAX_PLATFORMS=cpu, or GPUs hidden by
    CUDA_VISIBLE_DEVICES, is the user's choice and gives None.
    """
    if environment.get("JAX_PLATFORMS", "").startswith("cpu") or backend not in (None, "cpu"):
        return None
    for accelerator in find_accelerators() if accelerators is None else accelerators:
        if accelerator.kind == "gpu" and environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            continue
        why, fix = driver_problem(accelerator) or ("", "")
        if backend and not why:
            why, fix = "it could not start the accelerator", "jaxseek doctor"
        if why:
            then = "computes" if backend else "would compute"
            return f"{accelerator} here, but JAX {then} on the CPU: {why}", fix
    return None


def driver_problem(accelerator: Accelerator) -> tuple[str, str] | None:
    """Return (why the packages here cannot drive it, the command that fixes it); None if they should."""
    jax = installed("jax") or ""
    if accelerator.kind == "tpu":
        release = good_release_for_tpu(jax)
        fix = f"pip install 'jax[tpu]=={release}'" if release else "pip install 'jax[tpu]'"
        libtpu, expected = installed("libtpu"), expected_libtpu()
        if libtpu is None:
            return "libtpu is not installed", fix
        if expected and numbers(libtpu) < numbers(expected):
            return f"libtpu {libtpu} is older than jax {jax} expects ({expected})", fix
        return _unreachable(accelerator)
    plugins = {name: version for name in CUDA_PLUGINS if (version := installed(name))}
    cuda = next((name.split("-")[1] for name in plugins), "cuda12")
    fix = f"pip install 'jax[{cuda}]=={jax}'" if jax else "pip install 'jax[cuda12]'"
    if not accelerator.devices:
        return (
            "its driver is not loaded (no /dev/nvidia0)",
            "install NVIDIA's driver, or docker run --gpus all",
        )
    if not plugins:
        return "JAX's CUDA plugin is not installed", fix
    jaxlib = installed("jaxlib") or ""
    for name, version in plugins.items():
        if numbers(version) != numbers(jaxlib):
            return f"{name} {version} is not used with jaxlib {jaxlib}", fix
    return _unreachable(accelerator)


def _unreachable(accelerator: Accelerator) -> tuple[str, str] | None:
    closed = [p for p in accelerator.devices if not os.access(p, os.R_OK | os.W_OK)]
    return (f"no permission for {closed[0]}", f"sudo chmod a+rw {closed[0]}") if closed else None


def good_release_for_tpu(jax: str) -> str:
    """Return the installed release of jax, or the nearest one whose libtpu is not in BAD_LIBTPU."""
    bad: dict[tuple[int, ...], str] = {(0, 10, 2): "0.10.1", (0, 11, 2): "0.12.0"}
    return bad.get(numbers(jax)[:3], jax)


def expected_libtpu() -> str | None:
    """Return the libtpu version that the installed jax requires for its tpu extra, without `.*`, or None."""
    try:
        requirements = importlib.metadata.requires("jax") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (re.match(r"libtpu\s*==\s*([\d.]+?)(\.\*)?\s*;", line) for line in requirements)
    return next((match[1] for match in found if match), None)


def installed(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version, for comparisons: (0, 10, 2) for 0.10.2.dev1."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def holders(accelerator: Accelerator, root: Path = Path("/")) -> dict[int, str]:
    """Return {process id: command} of other processes that have the accelerator's files open.

    Without root, only the user's own processes are visible.
    """
    files = {str(p) for p in accelerator.devices}
    found = {}
    for process in sorted((root / "proc").glob("[0-9]*")):
        try:
            if any(os.readlink(fd) in files for fd in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(process.name)] = command.strip()
        except OSError:  # the process has ended, or belongs to another user
            continue
    found.pop(os.getpid() if root == Path("/") else -1, None)
    return found


def _pci_devices(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (vendor, device, class) of the first function of every PCI device."""
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
