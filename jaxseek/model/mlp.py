"""SwiGLU feed-forward (HF DeepseekV3MLP, LlamaMLP)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from flax import nnx

from jaxseek.model.linear import Joined, linear
from jaxseek.sharding.parameters import Init

if TYPE_CHECKING:
    from jaxseek.model.layer import Context


class MLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, width: int, hidden: int, bias: bool, init: Init):
        D, F = width, hidden
        self.gate_DF = init((D, F), ("embed", "mlp"))
        self.up_DF = init((D, F), ("embed", "mlp"))
        self.down_FD = init((F, D), ("mlp", "embed"))
        self.gate_up: Joined | None = nnx.data(None)
        self.gate_bias_F = init((F,), ("mlp",), fill=0.0) if bias else None
        self.up_bias_F = init((F,), ("mlp",), fill=0.0) if bias else None
        self.down_bias_D = init((D,), ("embed",), fill=0.0) if bias else None

    def join(self) -> None:
        """For Layer.join."""
        self.gate_up, self.down_FD = Joined(self.gate_DF, self.up_DF), Joined(self.down_FD)
        self.gate_DF = self.up_DF = None

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        dtype, use, wide = x_BTD.dtype, ctx.rules.use, ("batch", "length", "mlp")
        if self.gate_up is None:
            gate_BTF, up_BTF = (linear(x_BTD, w, ctx, *wide) for w in (self.gate_DF, self.up_DF))
        else:
            gate_BTF, up_BTF = self.gate_up(x_BTD)
        if self.gate_bias_F is not None:
            gate_BTF += use(self.gate_bias_F, dtype)[None, None]
            up_BTF += use(self.up_bias_F, dtype)[None, None]
        hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
        y_BTD = linear(hidden_BTF, self.down_FD, ctx, "batch", "length", None)
        return y_BTD if self.down_bias_D is None else y_BTD + use(self.down_bias_D, dtype)[None, None]
