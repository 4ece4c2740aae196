"""The experts' SwiGLU for few rows: every expert for every row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxseek.ops.scaled import Scaled, numbers, value_and_scale


def every_expert_mlp(
    x_ND: jax.Array,
    gates_NE: jax.Array,
    gate_EDF: jax.Array | Scaled,
    up_EDF: jax.Array | Scaled,
    down_EFD: jax.Array | Scaled,
) -> jax.Array:
    """Sum of gate times expert output over all experts, [N, D], zero gates included: for few rows on TPU.

    A step that reads every expert anyway gains nothing by sorting rows, and batched products read the experts
    where they are, quantised ones as they are: a Pallas call would have each layer's slice copied, and made
    bfloat16, first. For one device or inside shard_map.
    """

    def product(equation: str, a: jax.Array, w: jax.Array | Scaled) -> jax.Array:
        value, scale = value_and_scale(w)
        if scale is None or scale.shape[1] > 1:  # a scale per group of inputs cannot wait for the product
            value, scale = numbers(w, a.dtype), 1.0
        return jnp.einsum(equation, a, value.astype(a.dtype), preferred_element_type=jnp.float32) * scale

    gate_ENF, up_ENF = (product("ND,EDF->ENF", x_ND, w) for w in (gate_EDF, up_EDF))
    hidden_ENF = (jax.nn.silu(gate_ENF) * up_ENF).astype(x_ND.dtype)
    y_END = product("ENF,EFD->END", hidden_ENF, down_EFD)
    return jnp.einsum("END,NE->ND", y_END, gates_NE).astype(x_ND.dtype)
