"""The attention mask, from positions and segments."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax

from jaxseek.sharding.rules import Rules


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """The keys that each query sees: those of its own segment that are not later.

    `q_prefix_BT` names a second segment per query, a prefix that several segments share and that stands
    before them. `chosen_BTS` restricts queries to chosen keys (sparse attention). In a cache, slot s holds
    position s and every slot belongs to the row, so `kv_seg_BS` is None.
    """

    q_pos_BT: jax.Array
    q_seg_BT: jax.Array
    kv_pos_BS: jax.Array
    kv_seg_BS: jax.Array | None
    chosen_BTS: jax.Array | None = None
    q_prefix_BT: jax.Array | None = None

    def laid_out(self, rules: Rules) -> Mask:
        """The mask with the queries laid out by these rules."""
        names = ("q_pos_BT", "q_seg_BT", "q_prefix_BT")
        given = {name: a for name in names if (a := getattr(self, name)) is not None}
        return replace(self, **{name: rules.shard(a, "batch", "length") for name, a in given.items()})

    def with_whole_keys(self, rules: Rules) -> Mask:
        """The mask of a cache whose slots are gathered on every device."""
        return replace(self, kv_pos_BS=rules.shard(self.kv_pos_BS, None, None))

    def dense(self) -> jax.Array:
        """Booleans [B, T, S]: true where a query sees a key."""
        mask_BTS = self.kv_pos_BS[:, None, :] <= self.q_pos_BT[:, :, None]
        if self.kv_seg_BS is not None:
            same_BTS = self.kv_seg_BS[:, None, :] == self.q_seg_BT[:, :, None]
            if self.q_prefix_BT is not None:
                same_BTS |= self.kv_seg_BS[:, None, :] == self.q_prefix_BT[:, :, None]
            mask_BTS &= same_BTS
        return mask_BTS if self.chosen_BTS is None else mask_BTS & self.chosen_BTS
