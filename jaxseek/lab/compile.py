"""Compile a Job in a process of its own, and cache the result under a hash of its inputs."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxseek.config.model import ConfigError
from jaxseek.lab.job import Job
from jaxseek.storage.untrusted import read_json

# Keeps libtpu from looking for a TPU, or for another process that uses it.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class CompileError(ValueError):
    """The TPU compiler rejected a program; `needed` is the HBM that it asked for in bytes, if known."""

    def __init__(self, text: str, needed: float | None = None):
        super().__init__(text)
        self.needed = needed


@dataclass(frozen=True)
class Compiled:
    """A compiled program: sizes in bytes on one device, coordinates, timings, and the folder of its HLO text.

    `given` has the bytes of the arguments by kind, `memory` the compiler's memory statistics, `coords` the
    torus coordinates of every partition in mesh order, `seconds` the time of lowering and of compiling.
    """

    given: dict[str, float]
    memory: dict[str, int]
    coords: tuple[tuple[int, ...], ...]
    seconds: dict[str, float]
    folder: Path

    @property
    def text(self) -> str:
        return gzip.decompress((self.folder / "program.hlo.gz").read_bytes()).decode()

    @property
    def peak(self) -> int:
        """Peak HBM in bytes: arguments, outputs that do not alias them, temporaries and code."""
        m = self.memory
        return m["argument"] + m["output"] - m["alias"] + m["temp"] + m["generated_code"]


def cache_dir() -> Path:
    """Return the directory of cached compilations."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxseek" / "lab"


def key_of(job: Job) -> str:
    """Hash a job for the cache: model, strategy, workload, package versions and this package's source."""
    versions = [importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax", "libtpu")]
    package = Path(__file__).parent.parent
    sources = [p for p in sorted(package.rglob("*.py")) if p.parent != Path(__file__).parent]
    sources += [Path(__file__).with_name("job.py")]
    digest = hashlib.sha256(repr((dataclasses.asdict(job), versions)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def compile_job(job: Job, progress: Callable[[str], None] = lambda text: None) -> Compiled:
    """Return the compiled job, from the cache or from the TPU compiler.

    `progress` receives the stage about once a second. Raises ConfigError if libtpu is missing, and
    CompileError if the program does not compile, for want of memory among other reasons.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"the TPU compiler is missing: pip install 'jax[tpu]=={importlib.metadata.version('jax')}'"
        )
    folder = cache_dir() / key_of(job)
    if not (folder / "result.json").is_file() and not (folder / "error.json").is_file():
        _compile(job, folder, progress)
    if (folder / "error.json").is_file():
        raise CompileError(**read_json(folder / "error.json", ConfigError))
    raw: dict[str, Any] = read_json(folder / "result.json", ConfigError)
    coords = tuple(map(tuple, raw["coords"]))
    return Compiled(raw["given"], raw["memory"], coords, raw["seconds"], folder)


def _compile(job: Job, folder: Path, progress: Callable[[str], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        (partial / "job.pickle").write_bytes(pickle.dumps(job))
        command = [sys.executable, "-m", "jaxseek.lab.compiler", str(partial / "job.pickle"), str(partial)]
        # The compilation cache and XLA_FLAGS are meant for CPU, and libtpu aborts on flags it does not know
        # (its own are in LIBTPU_INIT_ARGS).
        kept = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")}
        start = time.monotonic()
        with (partial / "log").open("wb") as log:
            worker = subprocess.Popen(command, env=kept | ENVIRONMENT, stdout=log, stderr=log)
            try:
                while worker.poll() is None:
                    stage = "compiling" if (partial / "lowered").exists() else "tracing"
                    progress(f"{stage} for {job.topology.name}, {time.monotonic() - start:.0f} s")
                    time.sleep(0.2 if time.monotonic() - start < 5 else 1)
            finally:
                if worker.poll() is None:
                    worker.kill()
                    worker.wait()
        if worker.returncode:
            error = explain((partial / "log").read_text(encoding="utf-8", errors="replace"))
            error["text"] += largest_buffers(partial / "dump")
            if error["needed"] is None:  # only out-of-memory errors are cached
                raise CompileError(**error)
            (partial / "error.json").write_text(json.dumps(error), encoding="utf-8")
        shutil.rmtree(partial / "dump", ignore_errors=True)
        for name in ("job.pickle", "log", "lowered"):
            (partial / name).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def explain(log: str) -> dict[str, Any]:
    """Extract the compiler's error from a worker's log as {"text", "needed"}; `needed` is bytes or None."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    size = r"([\d.]+)([KMG])"
    found = re.search(rf"Used {size} of {size} hbm", log)
    found = found or re.search(rf"required for [\w ]+ \({size}\) exceeds available HBM \({size}\)", log)
    if found:
        used, has = float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]
        text = f"does not fit: needs {used / 2**30:.2f} GiB of HBM per device of {has / 2**30:.2f}"
        return {"text": text, "needed": used}
    if found := re.search(r"VmemError: (.*)", log):
        return {"text": found[1], "needed": None}
    # in order of preference: the compiler's notes come last
    kinds = (r"^[\w.]*Error: ", r"^[\w.]*(Error|Exception|Unimplemented)\b")
    lines = [line for kind in kinds for line in log.splitlines() if re.match(kind, line)]
    text = lines[0] if lines else "\n".join(log.splitlines()[-5:])
    return {"text": f"the TPU compiler failed: {text[:1000]}", "needed": None}


def largest_buffers(dump: Path, count: int = 8) -> str:
    """Format the compiler's list of its largest buffers, largest first; "" if it wrote none."""
    reports = sorted(dump.glob("*memory-usage-report.txt"))
    rows = re.findall(
        r"\(\s*\d+%\);\s*([\d.]+[KMG]iB);[^;]*;[^;]*; (.*)", reports[-1].read_text() if reports else ""
    )
    return "".join(f"\n    {size:>10s}  {shapes[:90]}" for size, shapes in rows[:count])
