"""SwiGLU feed-forward (HF DeepseekV3MLP, LlamaMLP)."""

from __future__ import annotations

import jax
from flax import nnx

from jaxseek.model.context import Context
from jaxseek.sharding.parameters import Init


class MLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, width: int, hidden: int, bias: bool, init: Init):
        D, F = width, hidden
        self.gate_DF = init((D, F), ("embed", "mlp"))
        self.up_DF = init((D, F), ("embed", "mlp"))
        self.down_FD = init((F, D), ("mlp", "embed"))
        self.gate_bias_F = init((F,), ("mlp",), fill=0.0) if bias else None
        self.up_bias_F = init((F,), ("mlp",), fill=0.0) if bias else None
        self.down_bias_D = init((D,), ("embed",), fill=0.0) if bias else None

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        dtype, use, wide = x_BTD.dtype, ctx.rules.use, ("batch", "length", "mlp")
        gate_BTF = self.gate_DF.matmul(x_BTD, ctx, *wide)
        up_BTF = self.up_DF.matmul(x_BTD, ctx, *wide)
        if self.gate_bias_F is not None:
            gate_BTF += use(self.gate_bias_F, dtype)[None, None]
            up_BTF += use(self.up_bias_F, dtype)[None, None]
        hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
        y_BTD = self.down_FD.matmul(hidden_BTF, ctx, "batch", "length", None)
        if self.down_bias_D is not None:
            y_BTD += use(self.down_bias_D, dtype)[None, None]
        return y_BTD
