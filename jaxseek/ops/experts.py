"""The routed experts' SwiGLU over the experts of one shard: the chooser of its forms.

Rows sorted by expert and grouped matmuls (grouped_mlp.py) serve everywhere, and alone have gradients. On TPU
few rows run through every expert instead (every_expert.py), or, where a decode step gives the stack of all
layers, through a kernel that reads only the experts with a token (chosen_experts.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxseek.ops import few_rows
from jaxseek.ops.chosen_experts import chosen_experts_mlp
from jaxseek.ops.every_expert import every_expert_mlp, every_expert_mlp_by_output
from jaxseek.ops.few_rows import ByOutput
from jaxseek.ops.fp8 import round_blocks
from jaxseek.ops.grouped_mlp import Matrices, grouped_mlp
from jaxseek.ops.platform import platform
from jaxseek.ops.sorted_rows import combine, rows_of, sorted_by_expert
from jaxseek.sharding.rules import Rules

FEW = 32  # rows; a TPU reads the experts longer than it multiplies up to some 100 (docs/lab.md, 2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experts:
    """The experts' matrices: gate and up [E, D, F], down [E, F, D]; on CPU, decoding may have them ByOutput.

    With a `layer`, they are those of a stack of layers, [L, E, ...], of which that layer is meant.
    """

    gate: Matrices
    up: Matrices
    down: Matrices
    layer: jax.Array | None = None

    @property
    def count(self) -> int:
        """Number of experts, on this shard within shard_map."""
        return self.down.shape[-3]

    @property
    def matrices(self) -> tuple[Any, Any, Any]:
        """gate, up and down, all of one kind."""
        return self.gate, self.up, self.down

    def rounded(self) -> Experts:
        """The matrices rounded to FP8 in blocks of 128 x 128."""
        gate, up, down = (round_blocks(w, lead=1) for w in self.matrices)  # type: ignore[arg-type]
        return dataclasses.replace(self, gate=gate, up=up, down=down)

    def specs(self, rules: Rules) -> Experts:
        """PartitionSpecs of the arrays, for shard_map; an axis of size one is not split."""

        def spec(w: Any, *names: str | None) -> Any:
            names = names if self.layer is None else (None, *names)
            return jax.tree.map(
                lambda a: rules.spec(*(x if n > 1 else None for x, n in zip(names, a.shape))), w
            )

        wide = ("expert", None, "expert_mlp")
        layer = None if self.layer is None else jax.sharding.PartitionSpec()
        down = spec(self.down, "expert", "expert_mlp", None)
        return Experts(spec(self.gate, *wide), spec(self.up, *wide), down, layer)  # type: ignore[arg-type]


def experts_mlp(
    x_ND: jax.Array,
    ids_NK: jax.Array,
    gates_NK: jax.Array,
    experts: Experts,
    touched_share: float,
    fp8: bool = False,
) -> jax.Array:
    """Sum of gate times expert output over each row's experts of this shard, [N, D].

    Ids count from the shard's first expert; others than 0 .. E - 1 have no effect. `touched_share` is the
    expected share of experts with a token, for the kernel's cost estimate.
    """
    E, N = experts.count, len(x_ND)
    few_on_tpu = platform() == "tpu" and N <= FEW and not fp8
    by_output = isinstance(experts.gate, ByOutput) and N <= few_rows.FEW and ids_NK.size >= E
    if experts.layer is not None or few_on_tpu or by_output:
        hit_NKE = ids_NK[:, :, None] == jnp.arange(E)[None, None]
        gates_NE = jnp.where(hit_NKE, gates_NK[:, :, None], 0).sum(1)
        if experts.layer is not None:
            return chosen_experts_mlp(x_ND, gates_NE, *experts.matrices, experts.layer, E * touched_share)
        every = every_expert_mlp_by_output if by_output else every_expert_mlp
        return every(x_ND, gates_NE, *experts.matrices)
    here_NK = (ids_NK >= 0) & (ids_NK < E)
    at_NK, order_M, sizes_E = sorted_by_expert(jnp.where(here_NK, ids_NK, E), E)
    y_MD = grouped_mlp(rows_of(x_ND, at_NK, order_M), *experts.matrices, sizes_E, fp8, clear=False)
    return combine(y_MD, gates_NK, at_NK, order_M)
