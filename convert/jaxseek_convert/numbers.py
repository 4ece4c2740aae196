"""Storage formats of a weight, row by row: floats, or quantised values with scales.

A quantised weight is q * scale: a product, even if the scale is called `weight_scale_inv`. Here a scale
belongs to one row and a group of columns; DeepSeek's FP8 scale of a 128 x 128 block is repeated for each row
of the block. int4 values are packed in pairs, the even column in the low half of the byte. Integers are
rounded symmetrically, to nearest. Sources: DeepSeek-V3's README_WEIGHTS.md and fp8_cast_bf16.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxseek.checkpoint.directory import CheckpointError

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOATS = (BF16, F16, F32)
SCALES = (F32, BF16, F16, np.dtype(ml_dtypes.float8_e8m0fnu))  # dtypes of scales on disk
BLOCK = 128
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Form:
    """Storage format of a weight: `kind` is a dtype name; `int4` packs pairs of columns.

    In a quantised weight, `group` columns (None: the whole row) and `block` rows (FP8 only) share a scale.
    With `powers`, scales are powers of two (the ue8m0 format).
    """

    kind: str
    group: int | None = None
    block: int = 1
    powers: bool = False

    @property
    def quantized(self) -> bool:
        return self.kind in ("int8", "int4", "float8_e4m3fn")

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the stored array."""
        return np.dtype(np.uint8) if self.kind == "int4" else jnp.dtype(self.kind)

    def columns(self, n: int) -> int:
        """Return the columns of the stored array for n values per row."""
        return n // 2 if self.kind == "int4" else n

    def groups(self, n: int) -> int:
        """Return the number of scales for a row of n values."""
        return 1 if self.group is None else -(-n // self.group)


def float8(how: Mapping[str, Any] | None) -> Form:
    """Return the FP8 form with the block size and scale format of a config.json's `quantization_config`."""
    how = how or {}
    rows, columns = how.get("weight_block_size") or (BLOCK, BLOCK)
    return Form(FP8.name, columns, rows, how.get("scale_fmt") == "ue8m0")


FLOAT8 = float8(None)
QUANTIZED = {"int8": Form("int8"), "int4": Form("int4", BLOCK), "fp8": FLOAT8}


@dataclass(frozen=True)
class Rows:
    """Stored rows of a weight: values [R, C] or [R], and scales [R, groups] if quantised."""

    values: np.ndarray
    scale: np.ndarray | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes that reading a source takes beside the rows: per thread, and shared by all threads."""

    thread: int = 0
    shared: int = 0


def change(rows: Rows, old: Form, new: Form) -> Rows:
    """Convert rows to another form, rounding to nearest if it is narrower.

    For FP8 the rows must start at the first row of a block.
    """
    if old == new:
        return rows
    if not new.quantized:
        return Rows(decode(rows, old, new.dtype))
    return encode(decode(rows, old, F32), new)


def decode(rows: Rows, form: Form, dtype: Any) -> np.ndarray:
    """Dequantise or cast rows to `dtype`, rounding once."""
    if not form.quantized:
        return rows.values.astype(dtype, copy=False)
    assert rows.scale is not None
    values = rows.values.view(np.uint8)
    return np.asarray(_decode(values, rows.scale, form, np.dtype(dtype).name))


def encode(numbers: np.ndarray, form: Form) -> Rows:
    """Quantise float32 values [R, C].

    The scale maps a group's largest magnitude to the largest representable value. For int4 it is the one of
    four candidates with the least squared error: those that map the largest value to 7 or to -8, and the
    same times 0.9, which clip. A group with a value that is not finite gets a NaN scale.
    """
    most = np.float32({"int8": 127.0, "int4": 7.0}.get(form.kind, E4M3_MAX))
    values, scale = _encode(numbers, most, form)
    return Rows(np.asarray(values).view(form.dtype), np.asarray(scale))


@functools.partial(jax.jit, static_argnames=("form", "dtype"))
def _decode(values: jax.Array, scale: jax.Array, form: Form, dtype: str) -> jax.Array:
    if form.kind == "int4":
        pairs = jnp.stack([values & 15, values >> 4], -1).reshape(len(values), -1)
        numbers = (pairs ^ 8).astype(jnp.float32) - 8
    elif form.kind == "int8":
        numbers = jax.lax.bitcast_convert_type(values, jnp.int8).astype(jnp.float32)
    else:
        numbers = _e4m3(values.astype(jnp.uint32))
    R, C = numbers.shape
    g = form.group or C
    G = form.groups(C)
    padded = jnp.pad(numbers, ((0, 0), (0, G * g - C))).reshape(R, G, g)
    return (padded * scale[..., None]).reshape(R, G * g)[:, :C].astype(dtype)


def _e4m3(byte: jax.Array) -> jax.Array:
    """Decode e4m3 bytes with bit operations, twice as fast as XLA:CPU's cast."""
    magnitude = byte & 0x7F
    # rebias the exponent from 7 (e4m3) to 127 (float32); subnormals, below 2^-6, are multiples of 2^-9
    normal = jax.lax.bitcast_convert_type((magnitude << 20) + (120 << 23), jnp.float32)
    small = magnitude.astype(jnp.float32) * jnp.float32(2.0**-9)
    number = jnp.where(magnitude < 8, small, jnp.where(magnitude == 0x7F, jnp.nan, normal))
    return jnp.where(byte >= 0x80, -number, number)


@functools.partial(jax.jit, static_argnames="form")
def _encode(numbers: jax.Array, most: jax.Array, form: Form) -> tuple[jax.Array, jax.Array]:
    """Pass `most` as an array: XLA turns division by a constant into an inexact multiplication."""
    R, C = numbers.shape
    g, b, G = form.group or C, form.block, form.groups(C)
    padded = jnp.pad(numbers, ((0, -R % b), (0, G * g - C))).reshape(-1, b, G, g)
    amax = jnp.abs(padded).max((1, 3))
    scale = jnp.where(amax == 0, 1.0, _divisor(amax / most))
    if form.kind == "int4":
        scale = _least_error(padded[:, 0], scale)
    if form.powers:
        mantissa, exponent = jnp.frexp(scale)  # round up to a power of two
        scale = jnp.where(mantissa > 0.5, jnp.ldexp(jnp.ones_like(scale), exponent), scale)
    q = (padded / scale[:, None, :, None]).reshape(-1, G * g)[:R, :C]
    finite = jnp.isfinite(padded).all((1, 3))  # XLA:CPU's max ignores NaN
    scale = jnp.repeat(jnp.where(finite, scale, jnp.nan), b, 0)[:R]
    if form.kind not in ("int8", "int4"):
        return jnp.clip(q, -most, most).astype(jnp.float8_e4m3fn), scale
    q = jnp.rint(q).astype(jnp.int8)
    if form.kind == "int8":
        return q, scale
    q = jnp.clip(q, -8, 7)
    low, high = jax.lax.bitcast_convert_type(q, jnp.uint8).reshape(R, -1, 2).transpose(2, 0, 1) & 15
    return low | high << 4, scale


def _divisor(scale: jax.Array) -> jax.Array:
    """Raise subnormal scales to the smallest normal number: XLA would divide by zero instead."""
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.where(jnp.abs(scale) < tiny, tiny, scale)


def _least_error(numbers: jax.Array, scale: jax.Array) -> jax.Array:
    """Return the int4 scale [R, G] with the least squared error for each group of `numbers` [R, G, g]."""
    largest = jnp.take_along_axis(numbers, jnp.abs(numbers).argmax(-1, keepdims=True), -1)[..., 0]
    signed = jnp.where(largest != 0, largest / -8, 1.0)  # maps the largest to -8, also if it is positive

    def error(s: jax.Array) -> jax.Array:
        s = s[..., None]
        return jnp.square(jnp.clip(jnp.rint(numbers / s), -8, 7) * s - numbers).sum(-1)

    choices = _divisor(jnp.stack([scale, signed, 0.9 * scale, 0.9 * signed]))
    errors = jax.lax.map(error, choices)
    return jnp.take_along_axis(choices, errors.argmin(0)[None], 0)[0]


def from_blocks(scale_inv: np.ndarray, first: int, rows: int, block: int) -> np.ndarray:
    """Expand scales of `block` rows each to rows [first, first + rows): float32 [rows, groups]."""
    low = first // block
    part = scale_inv[low : -(-(first + rows) // block)].astype(np.float32, copy=False)
    return part.repeat(min(block, first + rows), 0)[first - low * block :][:rows]


def to_blocks(scale: np.ndarray, form: Form) -> np.ndarray:
    """Reduce row scales, starting at a block's first row, to one scale per block.

    Raises CheckpointError if the rows of a block have different scales.
    """
    blocks = np.ascontiguousarray(scale[:: form.block])
    same = blocks.view(np.uint32).repeat(form.block, 0)[: len(scale)] == scale.view(np.uint32)
    if not same.all():
        raise CheckpointError(
            f"FP8 with other scales for the rows of a block of {form.block}: Hugging Face files hold one for "
            "all; choose another dtype (--dtype bf16)"
        )
    return blocks
