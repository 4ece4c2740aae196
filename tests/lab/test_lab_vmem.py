"""VMEM of Pallas kernels, counted from the traced step: by hand, and as the TPU compiler draws the line."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxseek.hardware import CHIPS
from jaxseek.lab import compile, vmem
from jaxseek.ops import grouped_mlp

MIB = 2**20


def add(x, y, o, s, flag):
    s[0] += x[0]
    o[...] = s[0][None] + y[...]


def too_large(x, rows, scratch, limit=None, steps=4):
    """A kernel that reads blocks of `rows` x 128 float32, one more that stays, and keeps `scratch` rows."""
    n = rows // 8
    return pl.pallas_call(
        add,
        grid=(steps,),
        in_specs=[
            pl.BlockSpec((n, 8, 128), lambda i: (i, 0, 0)),
            pl.BlockSpec((n, 8, 128), lambda i: (0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((n, 8, 128), lambda i: (i, 0, 0)),
        scratch_shapes=[pltpu.VMEM((scratch // 8, 8, 128), jnp.float32), pltpu.SMEM((8,), jnp.int32)],
        out_shape=jax.ShapeDtypeStruct((steps * n, 8, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=limit) if limit else None,
        name="too_large",
    )(x, x)


def traced(**given):
    x = jax.ShapeDtypeStruct((4096, 8, 128), jnp.float32)

    def step(x):  # in a loop, as a layer's kernel is
        return jax.lax.scan(lambda c, _: (c, too_large(x, **given)), 0, length=3)[1]

    return jax.jit(step).trace(x).jaxpr


def test_blocks_count_twice_unless_they_stay_and_scratch_once():
    block = 1024 * 128 * 4
    (eqn,) = vmem.kernels(traced(rows=1024, scratch=1024))
    assert vmem.needed(eqn) == (2 + 1 + 2) * block + block
    (eqn,) = vmem.kernels(traced(rows=1024, scratch=1024, steps=1))
    assert vmem.needed(eqn) == 3 * block + block


def test_a_kernel_that_is_too_large_is_refused_by_name_with_both_numbers():
    jaxpr = traced(rows=8192, scratch=8192)  # 4 MiB a block: 2 x 4 + 4 + 2 x 4, and 4 of scratch
    message = (
        r"kernel too_large needs 24.00 MiB .*float32\[1024, 8, 128\].* gets 16.00 of the 128 MiB of a v5e"
    )
    with pytest.raises(vmem.VmemError, match=message):
        vmem.check(jaxpr, CHIPS["v5e"])
    vmem.check(jaxpr, CHIPS["v6e"])
    vmem.check(traced(rows=8192, scratch=8192, limit=24 * MIB), CHIPS["v5e"])
    with pytest.raises(vmem.VmemError, match=r"gets 16.00 of the 16 MiB of a v4"):
        vmem.check(traced(rows=8192, scratch=8192, limit=24 * MIB), CHIPS["v4"])


def test_the_reason_comes_through_from_the_worker():
    log = "noise\njaxseek.lab.vmem.VmemError: the Pallas kernel x needs 24.00 MiB\n"
    assert compile.explain(log) == {"text": "the Pallas kernel x needs 24.00 MiB", "needed": None}


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_grouped_matmuls_of_deepseek_v3_fit_every_chip(chip):
    E, M, D, F = 8, 8192, 7168, 2048
    shapes = [((M, D), jnp.bfloat16), ((E, D, F), jnp.bfloat16), ((E, D, F), jnp.bfloat16)]
    shapes += [((E, F, D), jnp.bfloat16), ((E,), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*s) for s in shapes]

    def loss(x, *rest):
        return grouped_mlp._gmm_mlp(x, *rest).astype(jnp.float32).sum()

    with jax.numpy_dtype_promotion("standard"):  # megablox needs it
        jaxpr = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(*arguments).jaxpr
    assert len(list(vmem.kernels(jaxpr))) == 3 + 3 * 2  # each product, and its two gradients
    vmem.check(jaxpr, chip)


COMPILE = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from test_lab_vmem import too_large
device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
x = jax.ShapeDtypeStruct((4096, 8, 128), jnp.float32, sharding=SingleDeviceSharding(device))
rows, scratch = map(int, sys.argv[1:])
jax.jit(lambda x: too_large(x, rows, scratch)).lower(x).compile()
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the lab extra")
@pytest.mark.parametrize(("scratch", "fits"), [(11 * 2048, True), (12 * 2048, False)])
def test_the_compiler_draws_the_line_where_we_do(scratch, fits):
    rows = 2048  # 5 blocks of 1 MiB, and as many MiB of scratch: 16 with 11
    (eqn,) = vmem.kernels(traced(rows=rows, scratch=scratch))
    assert (vmem.needed(eqn) <= CHIPS["v5e"].scoped_vmem) == fits
    here = str(Path(__file__).parent)
    env = os.environ | compile.ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([here, *sys.path])}
    env.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(rows), str(scratch)], env=env, capture_output=True, text=True
    )
    assert (done.returncode == 0) == fits
    if not fits:
        assert re.search(r"size 17\.\d\dM and limit 16.00M", done.stderr)
