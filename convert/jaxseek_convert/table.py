"""The weight table: which tensors of a Hugging Face checkpoint hold which parameters, read both ways.

A row is a kind of tensor; a model has it if it has the row's parameters. `{l}` and `{e}` in a name are the
leading axes of the parameter: the layer (counted across stacks) and the expert. layout.py explains layouts.
Rotary rows keep their order on disk; the layers know how they pair.

Sources: transformers' modelling classes; the tensor map of DeepSeek-R1; DeepSeek-V3's README_WEIGHTS.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxseek.checkpoint.store import copy
from jaxseek.config.model import ModelConfig
from jaxseek.model.deepseek import DeepSeek, layer_runs
from jaxseek.sharding.parameters import parameters
from jaxseek_convert.layout import Index, Layout

# own:   the tensor that a parameter is read from and written to
# copy:  a duplicate of a parameter in the multi-token module, as in the releases; may be absent
# tied:  lm_head of a model with tied embeddings; optional, and written only if the source had it
Kind = Literal["own", "copy", "tied"]


@dataclass(frozen=True)
class Row:
    """A kind of tensor: name, layout, and parameter paths relative to the module of its section.

    Paths of copies are relative to the model.
    """

    name: str
    layout: str
    paths: tuple[str, ...]
    kind: Kind = "own"


def _row(name: str, layout: str, *paths: str, kind: Kind = "own") -> Row:
    return Row(name, layout, paths, kind)


MODEL = (
    _row("model.embed_tokens.weight", "V D -> VD", "embed_VD"),
    _row("model.norm.weight", "D -> D", "norm.scale_D"),
    _row("lm_head.weight", "V D -> DV", "head_DV"),
    _row("lm_head.weight", "V D -> VD", "embed_VD", kind="tied"),
)
LAYER = (
    _row("input_layernorm.weight", "D -> D", "attn_norm.scale_D"),
    _row("post_attention_layernorm.weight", "D -> D", "mlp_norm.scale_D"),
    # grouped-query attention
    _row("self_attn.q_proj.weight", "KGH D -> DKGH", "attn.q_DKGH"),
    _row("self_attn.q_proj.bias", "KGH -> KGH", "attn.q_bias_KGH"),
    _row("self_attn.k_proj.weight", "KH D -> DKH", "attn.k_DKH"),
    _row("self_attn.k_proj.bias", "KH -> KH", "attn.k_bias_KH"),
    _row("self_attn.v_proj.weight", "KH D -> DKH", "attn.v_DKH"),
    _row("self_attn.v_proj.bias", "KH -> KH", "attn.v_bias_KH"),
    _row("self_attn.o_proj.weight", "D KGH -> KGHD", "attn.o_KGHD"),
    _row("self_attn.o_proj.bias", "D -> D", "attn.o_bias_D"),
    _row("self_attn.q_norm.weight", "H -> H", "attn.q_head_norm.scale_D"),
    _row("self_attn.k_norm.weight", "H -> H", "attn.k_head_norm.scale_D"),
    # latent attention
    _row("self_attn.q_proj.weight", "NH D -> DNH", "attn.q_DNH"),
    _row("self_attn.q_a_proj.weight", "Q D -> DQ", "attn.q_a_DQ"),
    _row("self_attn.q_a_proj.bias", "Q -> Q", "attn.q_a_bias_Q"),
    _row("self_attn.q_a_layernorm.weight", "Q -> Q", "attn.q_norm.scale_D"),
    _row("self_attn.q_b_proj.weight", "NH Q -> QNH", "attn.q_b_QNH"),
    _row("self_attn.kv_a_proj_with_mqa.weight", "A D -> DA", "attn.kv_a_DA"),
    _row("self_attn.kv_a_proj_with_mqa.bias", "A -> A", "attn.kv_a_bias_A"),
    _row("self_attn.kv_a_layernorm.weight", "C -> C", "attn.kv_norm.scale_D"),
    _row("self_attn.kv_b_proj.weight", "N[P|H] C -> NPC, NHC", "attn.k_b_NPC", "attn.v_b_NHC"),
    _row("self_attn.o_proj.weight", "D NH -> NHD", "attn.o_NHD"),
    _row("self_attn.indexer.wq_b.weight", "NH Q -> QNH", "attn.indexer.q_b_QNH"),
    _row("self_attn.indexer.wk.weight", "H D -> DH", "attn.indexer.k_DH"),
    _row("self_attn.indexer.k_norm.weight", "H -> H", "attn.indexer.k_norm_H"),
    _row("self_attn.indexer.k_norm.bias", "H -> H", "attn.indexer.k_norm_bias_H"),
    _row("self_attn.indexer.weights_proj.weight", "N D -> DN", "attn.indexer.weights_DN"),
    # dense feed-forward
    _row("mlp.gate_proj.weight", "F D -> DF", "mlp.gate_DF"),
    _row("mlp.gate_proj.bias", "F -> F", "mlp.gate_bias_F"),
    _row("mlp.up_proj.weight", "F D -> DF", "mlp.up_DF"),
    _row("mlp.up_proj.bias", "F -> F", "mlp.up_bias_F"),
    _row("mlp.down_proj.weight", "D F -> FD", "mlp.down_FD"),
    _row("mlp.down_proj.bias", "D -> D", "mlp.down_bias_D"),
    # mixture of experts
    _row("mlp.gate.weight", "E D -> DE", "mlp.router_DE"),
    _row("mlp.gate.e_score_correction_bias", "E -> E", "mlp.router_bias_E"),
    _row("mlp.experts.{e}.gate_proj.weight", "F D -> DF", "mlp.gate_EDF"),
    _row("mlp.experts.{e}.up_proj.weight", "F D -> DF", "mlp.up_EDF"),
    _row("mlp.experts.{e}.down_proj.weight", "D F -> FD", "mlp.down_EFD"),
    _row("mlp.shared_experts.gate_proj.weight", "F D -> DF", "mlp.shared.gate_DF"),
    _row("mlp.shared_experts.gate_proj.bias", "F -> F", "mlp.shared.gate_bias_F"),
    _row("mlp.shared_experts.up_proj.weight", "F D -> DF", "mlp.shared.up_DF"),
    _row("mlp.shared_experts.up_proj.bias", "F -> F", "mlp.shared.up_bias_F"),
    _row("mlp.shared_experts.down_proj.weight", "D F -> FD", "mlp.shared.down_FD"),
    _row("mlp.shared_experts.down_proj.bias", "D -> D", "mlp.shared.down_bias_D"),
)
MTP = (
    _row("enorm.weight", "D -> D", "embed_norm.scale_D"),
    _row("hnorm.weight", "D -> D", "hidden_norm.scale_D"),
    _row("eh_proj.weight", "M 2D -> 2DM", "proj_2DD"),  # the embedding's columns come first
    _row("shared_head.norm.weight", "D -> D", "norm.scale_D"),
    _row("embed_tokens.weight", "V D -> VD", "embed_VD", kind="copy"),
    _row("shared_head.head.weight", "V D -> DV", "head_DV", kind="copy"),
    _row("shared_head.head.weight", "V D -> VD", "embed_VD", kind="copy"),
)


class Tensors:
    """A row in one section of a model: one tensor, or one per layer and expert.

    `paths` are the parameters' paths, `counts` the sizes of their leading axes, and `first` the numbers in
    the tensor names at which these axes start.
    """

    def __init__(
        self, name: str, row: Row, paths: Sequence[str], shapes: Sequence[tuple[int, ...]], first: int
    ):
        self.name, self.kind, self.paths = name, row.kind, tuple(paths)
        letters = [c for c in "le" if f"{{{c}}}" in name]
        self.first = tuple(first if c == "l" else 0 for c in letters)
        self.counts = shapes[0][: len(letters)]
        self.shapes = [shape[len(letters) :] for shape in shapes]
        self.layout = Layout(row.layout, self.shapes)
        self._letters = letters

    def name_at(self, at: tuple[int, ...]) -> str:
        """Return the name of the tensor at these indices of the leading axes."""
        return self.name.format(**{c: f + i for c, f, i in zip(self._letters, self.first, at)})

    def read(
        self, path: str, at: Index, out: np.ndarray, fetch: Callable[[str, Index], np.ndarray], *done: int
    ) -> None:
        """Fill `out` with slice `at` of parameter `path`; `fetch(name, index)` returns part of a tensor."""
        if len(done) < len(self.counts):
            for i in range(at[0].start, at[0].stop):
                self.read(path, at[1:], out[i - at[0].start], fetch, *done, i)
        else:
            name = self.name_at(done)
            copy(out, self.layout.read(self.paths.index(path), at, lambda index: fetch(name, index)))


class Table:
    """All tensors of a model, in sections: the model itself, each stack, each multi-token module."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        params = parameters(
            DeepSeek.abstract(cfg, dtype=jnp.bfloat16)
        )  # float32 then marks parameters that always are
        self.params: dict[str, jax.ShapeDtypeStruct] = {p: v.get_value() for p, v in params.items()}
        self.sections = [self._section(MODEL, "", "")]
        first, prefix = 0, "model.layers.{l}."
        for i, (_, count) in enumerate(layer_runs(cfg)):
            self.sections.append(self._section(LAYER, prefix, f"stacks.{i}.", first))
            first += count
        for k in range(cfg.num_nextn_predict_layers):
            self.sections.append(self._section(LAYER, prefix, f"mtp.{k}.stack.", first + k))
            self.sections.append(self._section(MTP, prefix.format(l=first + k), f"mtp.{k}."))
        own = {p for s in self.sections for t in s if t.kind == "own" for p in t.paths}
        assert own == self.params.keys(), f"no row for {sorted(self.params.keys() - own)}"

    def _section(self, rows: Sequence[Row], prefix: str, module: str, first: int = 0) -> list[Tensors]:
        out: dict[str, Tensors] = {}
        for row in rows:
            paths = [p if row.kind == "copy" else module + p for p in row.paths]
            if row.name not in out and all(p in self.params for p in paths):
                shapes = [self.params[p].shape for p in paths]
                out[row.name] = Tensors(prefix + row.name, row, paths, shapes, first)
        return list(out.values())

    def __iter__(self) -> Iterator[tuple[str, Tensors, tuple[int, ...]]]:
        """Yield every tensor in file order, layer by layer: (name, row, indices of the leading axes)."""
        for section in self.sections:
            for layer in np.ndindex(section[0].counts[:1]):
                for tensors in section:
                    for rest in np.ndindex(tensors.counts[1:]):
                        yield tensors.name_at(layer + rest), tensors, layer + rest

    def names(self) -> set[str]:
        """Return the names that a checkpoint has by default: own tensors and copies, without tied ones."""
        return {name for name, tensors, _ in self if tensors.kind in ("own", "copy")}

    def row_of(self, path: str) -> Tensors:
        """Return the row that a parameter is read from."""
        return next(t for s in self.sections for t in s if path in t.paths and t.kind == "own")


def hf_tensors(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all tensors of a Hugging Face checkpoint of this model."""
    table = Table(cfg)
    names = table.names()
    return {name: tensors.layout.shape for name, tensors, _ in table if name in names}
