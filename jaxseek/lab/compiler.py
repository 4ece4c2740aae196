"""Worker process of compile.py: read a pickled Job, compile it for TPU and write the result to a folder.

Started as `python -m jaxseek.lab.compiler JOB DIR`. It is a process of its own because libtpu prints a lot
and may abort.
"""

from __future__ import annotations

import gzip
import json
import pickle
import sys
import time
from pathlib import Path

import jax
from jax.experimental import topologies

from jaxseek.lab import vmem
from jaxseek.lab.job import Job, abstract_step


def main(job_file: str, out: str) -> None:
    job: Job = pickle.loads(Path(job_file).read_bytes())
    folder, start = Path(out), time.monotonic()
    config = {"chip_config_name": c} if (c := job.topology.chip.config) else {}
    slice_ = topologies.get_topology_desc(platform="tpu", topology_name=job.topology.name, **config)
    mesh = job.strategy.make_mesh(list(slice_.devices))
    with jax.set_mesh(mesh):
        step, args, given = abstract_step(job, mesh)
        traced = step.trace(*args)
        vmem.check(traced.jaxpr, job.topology.chip)
        lowered = traced.lower()
        seconds = {"lower": time.monotonic() - start}
        (folder / "lowered").touch()
        start = time.monotonic()
        compiled = lowered.compile({"xla_dump_to": str(folder / "dump"), "xla_dump_hlo_as_text": True})
        seconds["compile"] = time.monotonic() - start
    found = compiled.memory_analysis()
    sizes = ("argument", "output", "alias", "temp", "generated_code")
    result = {
        "seconds": seconds,
        "given": given,
        "memory": {name: getattr(found, f"{name}_size_in_bytes") for name in sizes},
        "coords": [list(d.coords) for d in mesh.devices.flat],
    }
    # Not compiled.as_text(): a jaxlib older than libtpu fails on HLO that it does not know.
    text = next((folder / "dump").glob("*.after_codegen.txt")).read_bytes()
    (folder / "program.hlo.gz").write_bytes(gzip.compress(text, 3))
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
