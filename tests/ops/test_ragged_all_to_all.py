"""Runs of rows between shards: the gathered form against what the collective is documented to do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxseek.ops.ragged_all_to_all import ragged_all_to_all
from jaxseek.sharding.strategy import Strategy

SENT, ROWS, WIDTH = 12, 20, 3


def exchanged(operand_PMD, inputs_SP, sizes_SP, outputs_SP):
    """Shard by shard, row by row: what s sends in run r is stored from the offset that s names on, by shard
    r // (runs of each pair)."""
    shards = len(operand_PMD)
    out = np.full((shards, ROWS, WIDTH), np.nan)  # where nobody writes
    for s, r in np.ndindex(sizes_SP.shape):
        for i in range(sizes_SP[s, r]):
            out[r * shards // sizes_SP.shape[1], outputs_SP[s, r] + i] = operand_PMD[s, inputs_SP[s, r] + i]
    return out


def random_exchange(shards, seed, most, runs):
    """Sizes of at most `most` rows, sent from and stored in places with gaps: inputs, sizes and outputs, each
    [source, runs of each pair], and the sizes that each shard receives, [shard, runs of each pair]."""
    rng = np.random.default_rng(seed)
    sizes_SPR = rng.integers(0, most + 1, (shards, shards, runs))
    sizes_SM, sizes_PM = sizes_SPR.reshape(shards, -1), sizes_SPR.swapaxes(0, 1).reshape(shards, -1)

    def places(sizes, rows):
        room = rows - sizes.sum(1, keepdims=True)
        return np.cumsum(sizes, 1) - sizes + np.sort(rng.integers(0, room + 1, sizes.shape), 1)

    inputs_SM, outputs_PM = places(sizes_SM, SENT), places(sizes_PM, ROWS)
    outputs_SM = outputs_PM.reshape(sizes_SPR.shape).swapaxes(0, 1).reshape(shards, -1)
    operand_PMD = rng.standard_normal((shards, SENT, WIDTH)).astype(np.float32)
    return operand_PMD, inputs_SM, sizes_SM, outputs_SM, sizes_PM


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
    ("mesh", "most", "runs"),
    [
        ("expert=2", 6, 1),
        ("expert=4", 3, 1),
        ("expert=2,fsdp=2", 1, 3),
        ("expert=2", 3, 2),
        ("expert=8", 1, 1),
    ],
)
def test_rows_arrive_where_the_collective_would_put_them_and_gradients_return(mesh, most, runs, seed):
    devices, split, run = program(mesh)
    operand_PMD, inputs_SM, sizes_SM, outputs_SM, recvs_PM = random_exchange(devices.size, seed, most, runs)
    dy = np.random.default_rng(9).standard_normal((devices.size, ROWS, WIDTH)).astype(np.float32)
    sizes = (a.astype(np.int32) for a in (inputs_SM, sizes_SM, outputs_SM, recvs_PM))
    with jax.set_mesh(devices):
        y, dx = run(*(jax.device_put(jnp.asarray(a), split) for a in (operand_PMD, dy, *sizes)))
    np.testing.assert_array_equal(y, exchanged(operand_PMD, inputs_SM, sizes_SM, outputs_SM))
    expected_dx = np.full_like(operand_PMD, np.nan)  # of rows that were not sent
    for s, r in np.ndindex(sizes_SM.shape):
        for i in range(sizes_SM[s, r]):
            expected_dx[s, inputs_SM[s, r] + i] = dy[r // runs, outputs_SM[s, r] + i]
    np.testing.assert_array_equal(dx, expected_dx)
