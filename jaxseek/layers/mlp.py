"""SwiGLU feed-forward (HF DeepseekV3MLP, LlamaMLP)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxseek.sharding import Init, Rules


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

    def __call__(self, x_BTD: jax.Array, rules: Rules) -> jax.Array:
        dtype, wide = x_BTD.dtype, rules.spec("batch", "length", "mlp")
        gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, rules.use(self.gate_DF, dtype), out_sharding=wide)
        up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, rules.use(self.up_DF, dtype), out_sharding=wide)
        if self.gate_bias_F is not None:
            gate_BTF += rules.use(self.gate_bias_F, dtype)[None, None]
            up_BTF += rules.use(self.up_bias_F, dtype)[None, None]
        hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
        narrow = rules.spec("batch", "length", None)
        y_BTD = jnp.einsum("BTF,FD->BTD", hidden_BTF, rules.use(self.down_FD, dtype), out_sharding=narrow)
        return y_BTD if self.down_bias_D is None else y_BTD + rules.use(self.down_bias_D, dtype)[None, None]
