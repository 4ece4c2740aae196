"""RMSNorm with float32 statistics (HF DeepseekV3RMSNorm)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxseek.sharding.parameters import Init


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, over the last axis, which is never split."""

    def __init__(self, width: int, eps: float, init: Init):
        self.eps = eps
        self.scale_D = init((width,), (None,), fill=1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)  # the mean of squares overflows and cancels in bfloat16
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        scale = self.scale_D[...].reshape(*(1,) * (x.ndim - 1), -1)
        return scale.astype(x.dtype) * x32.astype(x.dtype)
