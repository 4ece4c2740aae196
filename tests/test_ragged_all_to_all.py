"""Runs of rows between shards: the gathered form against what the collective is documented to do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxseek.kernels.ragged_all_to_all import ragged_all_to_all
from jaxseek.sharding import Strategy

SENT, ROWS, WIDTH = 12, 20, 3


def exchanged(operand_PMD, inputs_SP, sizes_SP, outputs_SP):
    """Shard by shard, row by row: what s sends to p is stored from the offset that s names on."""
    shards = len(operand_PMD)
    out = np.zeros((shards, ROWS, WIDTH))
    for s in range(shards):
        for p in range(shards):
            for i in range(sizes_SP[s, p]):
                out[p, outputs_SP[s, p] + i] = operand_PMD[s, inputs_SP[s, p] + i]
    return out


def random_exchange(shards, seed, most):
    """Sizes of at most `most` rows, sent from and stored in places with gaps."""
    rng = np.random.default_rng(seed)
    sizes_SP = rng.integers(0, most + 1, (shards, shards))
    room_in, room_out = SENT - sizes_SP.sum(1, keepdims=True), ROWS - sizes_SP.sum(0, keepdims=True)
    inputs_SP = np.cumsum(sizes_SP, 1) - sizes_SP + np.sort(rng.integers(0, room_in + 1, sizes_SP.shape), 1)
    outputs_SP = np.cumsum(sizes_SP, 0) - sizes_SP + np.sort(rng.integers(0, room_out + 1, sizes_SP.shape), 0)
    operand_PMD = rng.standard_normal((shards, SENT, WIDTH)).astype(np.float32)
    return operand_PMD, inputs_SP, sizes_SP, outputs_SP


@functools.cache
def program(mesh):
    """The exchange over the expert axis, with its pull-back, as one compiled function of global arrays."""
    strategy = Strategy.parse(mesh)
    axes = tuple(a for a, n in strategy.sizes if n > 1)

    def local(operand, inputs, sends, outputs, recvs):
        args = (a[0] for a in (inputs, sends, outputs, recvs))
        return ragged_all_to_all(operand[0], ROWS, *args, axes)[None]

    shared = jax.shard_map(local, in_specs=(P(axes),) * 5, out_specs=P(axes), check_vma=False)

    def both(operand, dy, *sizes):
        y, pull = jax.vjp(lambda a: shared(a, *sizes), operand)
        return y, pull(dy)[0]

    mesh = strategy.make_mesh()
    split = jax.NamedSharding(mesh, P(axes))
    return mesh, split, jax.jit(both)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("mesh", "most"), [("expert=2", 6), ("expert=4", 3), ("expert=2,fsdp=2", 3), ("expert=8", 1)]
)
def test_rows_arrive_where_the_collective_would_put_them_and_gradients_return(mesh, most, seed):
    devices, split, run = program(mesh)
    operand_PMD, inputs_SP, sizes_SP, outputs_SP = random_exchange(devices.size, seed, most)
    dy = np.random.default_rng(9).standard_normal((devices.size, ROWS, WIDTH)).astype(np.float32)
    sizes = (a.astype(np.int32) for a in (inputs_SP, sizes_SP, outputs_SP, sizes_SP.T))
    with jax.set_mesh(devices):
        y, dx = run(*(jax.device_put(jnp.asarray(a), split) for a in (operand_PMD, dy, *sizes)))
    np.testing.assert_array_equal(y, exchanged(operand_PMD, inputs_SP, sizes_SP, outputs_SP))
    there_and_back = exchanged(operand_PMD, inputs_SP, sizes_SP, outputs_SP)
    assert np.vdot(there_and_back, dy) == pytest.approx(np.vdot(operand_PMD, dx), rel=1e-5, abs=1e-5)
    expected_dx = np.zeros_like(operand_PMD)
    for s, p in np.ndindex(sizes_SP.shape):
        for i in range(sizes_SP[s, p]):
            expected_dx[s, inputs_SP[s, p] + i] += dy[p, outputs_SP[s, p] + i]
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-6)
