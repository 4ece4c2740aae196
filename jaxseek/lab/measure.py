"""Run a job's step on its devices: make the arguments there, and take the median of a few timed steps.

Everything here is independent of the devices, except `devices_of`, which rejects any but the job's slice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxseek.config.model import ConfigError
from jaxseek.engine import programs
from jaxseek.hardware import Topology
from jaxseek.lab.job import TOKENS_PER_DISPATCH, Job, abstract_step
from jaxseek.model.deepseek import DeepSeek
from jaxseek.sharding.parameters import fill, in_formats
from jaxseek.storage.place import Mirror, writable
from jaxseek.train import step as train
from jaxseek.train.batch import Batch

WARM_UP = 3  # calls; the first compiles, the second may still move data


@dataclass(frozen=True)
class Measured:
    """Seconds of each timed call (per decode step, where a call is a dispatch), and JAX's device kind."""

    seconds: tuple[float, ...]
    device: str

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        found = {"seconds": self.median, "least": min(self.seconds), "most": max(self.seconds)}
        return found | {"calls": len(self.seconds), "device": self.device}


def devices_of(topology: Topology, devices: Sequence[Any]) -> list[Any]:
    """Return `devices` if they are the slice; raise ConfigError that names those found and those needed."""
    chip, n = topology.chip, topology.num_devices
    kinds = sorted({f"{d.device_kind} ({d.platform})" for d in devices})
    found = f"{len(devices)} x {', '.join(kinds)}" if devices else "no devices"
    if all(d.platform == "tpu" and d.device_kind in chip.kinds for d in devices) and len(devices) == n:
        extent = tuple(len({d.coords[axis] for d in devices}) for axis in range(3))
        if sorted(extent) == sorted((*topology.dims, 1))[-3:]:
            return list(devices)
        found += " as " + "x".join(map(str, extent[: chip.torus]))
    raise ConfigError(
        f"--run needs the {n} devices of {topology.name} ({' or '.join(chip.kinds)}), but there are {found}; "
        "run it on that slice, on all its hosts, or leave --run out for the estimate alone"
    )


def measure(job: Job, mesh: Mesh, repeats: int, trace: str | None = None) -> Measured:
    """Run the job's step on a mesh: WARM_UP calls, then `repeats` timed ones.

    With `trace`, one more call is profiled and the profile written there. Weights are random numbers in the
    job's dtype, made on the devices.
    """
    with jax.set_mesh(mesh):
        step, args, _ = abstract_step(job, mesh)
        call = _Calls(job, step, args)
        for _ in range(WARM_UP):
            call()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            seconds.append((time.perf_counter() - start) / (TOKENS_PER_DISPATCH if call.decodes else 1))
        if trace:
            with contextlib.closing(Mirror(writable(trace))) as mirror, jax.profiler.trace(str(mirror.local)):
                call()
    return Measured(tuple(seconds), mesh.devices.flat[0].device_kind)


class _Calls:
    """A step and its arguments; each call blocks on the results and carries the state over to the next."""

    def __init__(self, job: Job, step: Any, args: Sequence[Any]):
        self.job, self.step, self.decodes = job, step, job.phase == "decode"
        self.args = [realise(a, job) for a in args]
        if self.decodes:  # the compiler chooses the layouts
            self.step = step.lower(*args).compile()
            weights, self.cached, *_ = self.step.input_formats[0]
            self.args[0] = in_formats(self.args[0], weights, donate=True)

    def __call__(self) -> Any:
        if self.decodes:
            self.args[1] = in_formats(self.args[1], self.cached)
        out = jax.block_until_ready(self.step(*self.args))
        for i, a in enumerate(self.args):
            if isinstance(a, programs.State):  # every call decodes from the same cache length
                again = {"position_B": _last_position(self.job, a.position_B.sharding)}
                again["done_B"] = constant(out[0].done_B, False)
                self.args[i] = dataclasses.replace(out[0], **again)
            elif isinstance(a, train.State):
                self.args[i] = out[0]
        return out


# -------------------------------------------------------------------- arguments


def realise(arg: Any, job: Job) -> Any:
    """Fill an abstract argument of a job's step with random weights, caches and tokens; keep the rest."""
    vocab = job.cfg.vocab_size
    if isinstance(arg, DeepSeek):
        return fill(arg, jax.sharding.get_mesh(), _weight(job))
    if isinstance(arg, programs.State):
        caches = jax.tree.map(lambda a: uniform(a, 1.0), arg.caches)
        return programs.State(
            caches,
            tokens(arg.token_B, vocab),
            _last_position(job, arg.position_B.sharding),
            constant(arg.done_B, False),
        )
    if isinstance(arg, train.State):
        moments, step = jax.tree.map(lambda a: constant(a, 0), (arg.moments, arg.step))
        return train.State(realise(arg.model, job), moments, step)
    if isinstance(arg, Batch):
        made = {f.name: getattr(arg, f.name) for f in dataclasses.fields(arg)}
        for name, a in made.items():
            if a is None:
                continue
            if name in ("tokens_BT", "ahead_BJT"):
                made[name] = tokens(a, vocab)
            elif name == "positions_BT":
                made[name] = _made(a, _positions, None)
            else:
                made[name] = constant(a, 1)
        return type(arg)(**made)
    return arg


def _weight(job: Job) -> Callable[[str, Any, NamedSharding], jax.Array]:
    def make(path: str, param: Any, sharding: NamedSharding) -> jax.Array:
        value, std = param.get_value(), job.cfg.initializer_range
        if (given := param.get_metadata("fill")) is not None:
            return constant(value, given)
        if path.endswith(".scale"):  # scale of a quantised matrix
            return constant(value, std / 64)
        return uniform(value, 64.0 if job.weights != "bf16" and value.dtype.itemsize == 1 else std)

    return make


def _last_position(job: Job, sharding: Any) -> jax.Array:
    """Position of the last token of every row, such that a dispatch fills the cache to its last slot."""
    start = max(0, job.context - TOKENS_PER_DISPATCH - 1)
    return constant(jax.ShapeDtypeStruct((job.batch,), jnp.int32, sharding=sharding), start)


def constant(a: Any, value: Any) -> jax.Array:
    """Make an array like the abstract `a`, filled with one value."""
    return _made(a, _constant, value)


def tokens(a: Any, vocab: int) -> jax.Array:
    """Make an array like the abstract `a`, of pseudo-random ints in [0, vocab)."""
    return _made(a, _tokens, vocab)


def uniform(a: Any, std: float) -> jax.Array:
    """Make an array like the abstract `a`, uniform with mean 0 and standard deviation `std`.

    Integer dtypes are rounded and kept in range. Values are hashes of each element's index, so that no buffer
    of random bits exists beside the array.
    """
    return _made(a, _uniform, std)


def _constant(a: Any, value: Any) -> jax.Array:
    return jnp.full(a.shape, value, a.dtype)


def _positions(a: Any, _: None) -> jax.Array:
    return jax.lax.broadcasted_iota(a.dtype, a.shape, a.ndim - 1)


def _tokens(a: Any, vocab: int) -> jax.Array:
    return (_hash(a) % jnp.uint32(vocab)).astype(a.dtype)


def _uniform(a: Any, std: float) -> jax.Array:
    unit = _hash(a).astype(jnp.int32).astype(jnp.float32) * 2.0**-31  # -1 to 1
    whole = jnp.issubdtype(a.dtype, jnp.integer)
    bound = min(std * math.sqrt(3), float(jnp.iinfo(a.dtype).max)) if whole else std * math.sqrt(3)
    return (jnp.round(unit * bound) if whole else unit * bound).astype(a.dtype)


def _hash(a: Any) -> jax.Array:
    """Hash each element's linear index to 32 pseudo-random bits (murmur3's finaliser)."""
    bits = jnp.uint32(math.prod(a.shape) % 2**32)
    for axis in range(a.ndim):
        stride = math.prod(a.shape[axis + 1 :]) % 2**32
        index = jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis, out_sharding=a.sharding)
        bits = bits + index * jnp.uint32(stride)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
    return bits ^ (bits >> jnp.uint32(16))


def _made(a: Any, make: Callable[[Any, Any], jax.Array], given: Any) -> jax.Array:
    return _program(make, given, a.shape, a.dtype, a.sharding)()


@functools.cache
def _program(
    make: Callable[[Any, Any], jax.Array], given: Any, shape: tuple[int, ...], dtype: Any, sharding: Any
) -> Callable[[], jax.Array]:
    """Compile one program for all arrays that are alike, ahead of the timed calls."""
    a = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return jax.jit(lambda: make(a, given), out_shardings=sharding)
