"""Check that the Pallas kernels of a traced step fit in a core's VMEM, before anything is compiled.

The compiler rejects a kernel that is too large too, but for a large program only after minutes. The count has
the blocks that the grid's pipeline brings in, doubled unless they are the same at every step, and the scratch
buffers. Memory that a kernel allocates itself is not counted, so the compiler may need more, never less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import Literal

from jaxseek.hardware import Chip


class VmemError(ValueError):
    """The blocks and scratch of a kernel do not fit in VMEM."""


def kernels(jaxpr: Any) -> Iterator[Any]:
    """Yield every pallas_call equation of a (closed) jaxpr, also inside loops and calls."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
        else:
            for value in eqn.params.values():
                for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns")):
                    if hasattr(inner, "eqns"):
                        yield from kernels(inner)


def needed(eqn: Any) -> int:
    """Bytes of VMEM that a pallas_call's blocks and scratch take, without tile padding."""
    grid = eqn.params["grid_mapping"]
    steps = [n for n in grid.grid if isinstance(n, int)]
    once = len(steps) == len(grid.grid) and math.prod(steps) == 1
    total = 0
    for block in grid.block_mappings:
        ref = block.transformed_block_aval
        if _in_vmem(ref):
            buffers = 2 if block.pipeline_mode is None else block.pipeline_mode.buffer_count
            total += _bytes(ref) * (1 if once or _constant(block.index_map_jaxpr.jaxpr) else buffers)
    return total + sum(_bytes(ref) for ref in grid.scratch_avals if _in_vmem(ref))


def check(jaxpr: Any, chip: Chip) -> None:
    """Raise VmemError for the first kernel of a traced step that does not fit in the chip's VMEM."""
    for eqn in kernels(jaxpr):
        asked = getattr(eqn.params["compiler_params"], "vmem_limit_bytes", None)
        limit = min(asked or chip.scoped_vmem, chip.vmem)
        if (wanted := needed(eqn)) > limit:
            grid, mib = eqn.params["grid_mapping"], 2**20
            blocks = ", ".join(
                f"{ref.dtype}{list(ref.shape)}"
                for ref in (*(b.transformed_block_aval for b in grid.block_mappings), *grid.scratch_avals)
                if _in_vmem(ref)
            )
            raise VmemError(
                f"the Pallas kernel {_name(eqn)} needs {wanted / mib:.2f} MiB of VMEM for its blocks and "
                f"scratch ({blocks}), but gets {limit / mib:.2f} of the {chip.vmem / mib:.0f} MiB of a "
                f"{chip.name} core; make its blocks smaller, or give pltpu.CompilerParams a larger "
                "vmem_limit_bytes"
            )


def _name(eqn: Any) -> str:
    return str(eqn.params.get("name") or eqn.params["jaxpr"].debug_info.func_name)


def _in_vmem(ref: Any) -> bool:
    """Return True for refs in VMEM, the default space of a block; not for semaphores, SMEM or HBM."""
    return str(ref.memory_space).split(".")[-1].lower() in ("vmem", "default", "none")


def _bytes(ref: Any) -> int:
    bits = 4 if ref.dtype.name in ("int4", "uint4") else 8 * ref.dtype.itemsize
    return math.prod(ref.shape) * bits // 8


def _constant(index_map: Any) -> bool:
    """Return True if an index map gives the same block at every step of the grid."""
    return all(isinstance(v, Literal) for v in index_map.outvars)
