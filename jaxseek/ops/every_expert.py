"""The experts' SwiGLU for few rows: every expert for every row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxseek.ops.few_rows import ByOutput, product_of_few
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


def every_expert_mlp_by_output(
    x_ND: jax.Array, gates_NE: jax.Array, gate_EDF: ByOutput, up_EDF: ByOutput, down_EFD: ByOutput
) -> jax.Array:
    """`every_expert_mlp` for few rows on one CPU device: all experts as one wide SwiGLU."""
    E, D, F = gate_EDF.shape
    gate_NFE, up_NFE = (
        product_of_few(x_ND, w.w_OEI.reshape(F * E, D)).reshape(-1, F, E) for w in (gate_EDF, up_EDF)
    )
    hidden_NFE = jax.nn.silu(gate_NFE) * up_NFE * gates_NE[:, None]
    hidden_NX = hidden_NFE.swapaxes(1, 2).reshape(-1, E * F)
    return product_of_few(hidden_NX, down_EFD.w_OEI.reshape(D, E * F)).astype(x_ND.dtype)
