"""ModelConfig: one frozen dataclass for every DeepSeek family, with Hugging Face's field names.

hf.py reads and writes `config.json`. Presets are TOML files with the same fields. Uses the standard library
only, so that reading a config is fast.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

from jaxseek.storage.untrusted import brief, read_json

DTYPES = ("bfloat16", "float16", "float32")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}

_V3_ROUTER: dict[str, Any] = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
_V3_ROUTER |= {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3}
_HALF_SPLIT = {"rope_interleave": False}  # llama's rotary layout
# model_type -> (Hugging Face class, its defaults for fields missing in config.json, fields that it fixes
# whatever config.json says).
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}, _HALF_SPLIT),
    "qwen2": ("Qwen2ForCausalLM", {"attention_bias": True}, _HALF_SPLIT | {"mlp_bias": False}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 128}, _HALF_SPLIT | {"mlp_bias": False}),
    "deepseek": ("DeepseekForCausalLM", {}, _HALF_SPLIT | {"mlp_bias": False}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {}, {"rope_interleave": True}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _V3_ROUTER | {"rope_interleave": True}, {"mlp_bias": False}),
    "deepseek_v32": ("DeepseekV32ForCausalLM", _V3_ROUTER, {"rope_interleave": True, "mlp_bias": False}),
}
MLA = ("deepseek_v2", "deepseek_v3", "deepseek_v32")
# These classes compute hidden_size / heads, or require that it divides.
_HEADS_DIVIDE = ("llama", "deepseek", "deepseek_v2")
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MLA_SHAPE = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
INDEX_SHAPE = ("index_n_heads", "index_head_dim", "index_topk")
MOE_SHAPE = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
MOE_FIELDS = {
    *MOE_SHAPE,
    "n_shared_experts",
    "first_k_dense_replace",
    "moe_layer_freq",
    "scoring_func",
    "topk_method",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "aux_loss_alpha",
    "seq_aux",
}

# The most that a config may have of what is counted through or allocated: far above every model.
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "n_shared_experts"), 1 << 10),
    "num_nextn_predict_layers": 1 << 6,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "index_n_heads"), 1 << 14),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 1 << 14),
    **dict.fromkeys(("n_routed_experts", "index_head_dim", "kv_lora_rank", "q_lora_rank"), 1 << 16),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 1 << 20),
    "vocab_size": 1 << 24,
    "rope_theta": 10**15,
    "rms_norm_eps": 1,
}
_MOST_NUMBER = (1 << 31) - 1  # of any other number: int32 on the devices
_MOST_EXPERTS = 1 << 17  # of all layers together, each of which has tensors of its own


class Location(Protocol):
    """A path, or an object with these methods of one."""

    def is_dir(self) -> bool: ...
    def __truediv__(self, part: str, /) -> Any: ...
    def read_bytes(self) -> bytes: ...


class ConfigError(ValueError):
    """A model or run configuration is invalid; the message says what was given and expected."""


def _check_types(config: RopeConfig | ModelConfig) -> None:
    """Raise ConfigError unless every field has its annotated type and no number is absurdly large.

    Integers become floats as annotated.
    """
    problems = []
    for name, hint in get_type_hints(type(config)).items():
        value, options = getattr(config, name), get_args(hint) or (hint,)
        numbers = value if isinstance(value, tuple) else (value,)
        most = _MOST.get(name, _MOST_NUMBER)
        if get_origin(hint) is Literal:
            if value not in options:
                problems.append(f"{name} is {brief(value)}, expected {', '.join(options)}")
        elif type(value) not in [get_origin(o) or o for o in options] and not (  # exact: True is no integer
            float in options and type(value) is int
        ):
            wanted = " or ".join(getattr(o, "__name__", str(o)) for o in options)
            problems.append(f"{name} is {brief(value)}, expected {wanted}")
        elif isinstance(value, tuple) and any(type(n) is not int for n in value):
            problems.append(f"{name} is {brief(value)}, expected whole numbers")
        elif any(type(n) in (int, float) and not abs(n) <= most for n in numbers):  # NaN is not
            problems.append(f"{name} is {brief(value)}, expected at most {most:,}")
        elif float in options and type(value) is int:
            object.__setattr__(config, name, float(value))
    if problems:
        raise ConfigError("; ".join(problems))


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding, with the fields of transformers' `rope_parameters`."""

    rope_type: Literal["default", "linear", "yarn", "llama3"] = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        _check_types(self)
        kind, length = self.rope_type, self.original_max_position_embeddings
        if self.rope_theta <= 0 or self.factor <= 0:
            raise ConfigError(f"rope_theta {self.rope_theta} and factor {self.factor} must be above 0")
        if kind in ("yarn", "llama3") and length <= 0:
            raise ConfigError(
                f"rope_type {kind!r} has original_max_position_embeddings {length}, expected above 0"
            )
        low, high = self.low_freq_factor, self.high_freq_factor
        if kind == "llama3" and not 0 < low < high:
            raise ConfigError(f"low_freq_factor {low} is not between 0 and high_freq_factor {high}")
        if kind == "yarn" and not (self.rope_theta > 1 and self.beta_fast > 0 and self.beta_slow > 0):
            raise ConfigError(
                f"rope_theta {self.rope_theta}, beta_fast {self.beta_fast} and beta_slow {self.beta_slow} "
                "must be above 1, 0 and 0"
            )


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return YaRN's attention temperature, `0.1 * mscale * ln(factor) + 1` (DeepSeek-V2 paper, 3.1.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of the whole model, with the field names and meanings of Hugging Face's `config.json`.

    The one exception is `head_dim`, the width of a query head: `qk_nope_head_dim + qk_rope_head_dim` in
    latent attention; otherwise it defaults to `hidden_size / num_attention_heads`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0
    max_position_embeddings: int = 4096
    rope: RopeConfig = field(default_factory=RopeConfig)
    rope_interleave: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    # Multi-head latent attention; kv_lora_rank 0 means grouped-query attention.
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # DeepSeek sparse attention (V3.2); index_topk 0 means dense attention.
    index_n_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0
    # Mixture of experts; n_routed_experts 0 means dense.
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "greedy"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    num_nextn_predict_layers: int = 0
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    # The contents of generation_config.json: how to sample from these weights, not what they compute.
    generation: dict = field(default_factory=dict, compare=False, repr=False)

    # ---------------------------------------------------------------- reading and writing

    @classmethod
    def from_hf(cls, source: str | Location | dict[str, Any]) -> ModelConfig:
        """Read a Hugging Face `config.json`, given its path, its directory's path, or the parsed dict.

        With a path, the generation_config.json beside it is read too. In a model of images and text, this is
        the config of its language model. Raises ConfigError for an unknown architecture, missing fields (all
        named at once), inconsistent values, and keys that ask for a computation that no DeepSeek model has.
        """
        if isinstance(source, dict):
            raw, where = dict(source), "config"
        else:
            if isinstance(source, str) and "://" in source:
                raise ConfigError(f"{source}: is a URL; pass jaxseek.storage.place.place({source!r}) instead")
            path: Any = Path(source) if isinstance(source, str) else source
            path = path / "config.json" if path.is_dir() else path
            where = str(path)
            try:
                raw = read_json(path, ConfigError)
            except FileNotFoundError:
                raise ConfigError(f"{where}: no such file; expected a Hugging Face config.json") from None
            beside = path.with_name("generation_config.json")
            raw["generation"] = read_json(beside, ConfigError) if beside.exists() else {}
        from jaxseek.config import hf

        try:
            return hf.read(raw, where)
        except ConfigError as e:
            raise ConfigError(f"{where}: {e}") from None

    def to_hf(self) -> dict[str, Any]:
        """Return this model's Hugging Face `config.json` as a dict; `from_hf(to_hf())` is the identity."""
        from jaxseek.config import hf

        return hf.write(self)

    @classmethod
    def from_preset(cls, name: str) -> ModelConfig:
        """Read the preset of a released or tiny model, such as `deepseek-r1` or `tiny-v3` (see `presets()`).

        Raises ConfigError for an unknown name.
        """
        found = presets()
        if name not in found:
            near = difflib.get_close_matches(name.rsplit("/", 1)[-1].lower(), found, 3, 0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"no preset {name!r}{hint} (jaxseek info --list names them all)")
        return cls.from_hf(_read_preset(found[name]))

    def replace(self, **changes: Any) -> ModelConfig:
        """Return a validated copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    # ---------------------------------------------------------------- validation

    def __post_init__(self) -> None:
        _check_types(self)
        problems: list[str] = []

        def need(ok: bool, text: str) -> None:
            if not ok:
                problems.append(text)

        def need_positive(*names: str) -> None:
            for name in names:
                need(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, expected above 0")

        if self.model_type not in FAMILIES:
            raise ConfigError(f"model_type is {self.model_type!r}; jaxseek knows {', '.join(FAMILIES)}")
        for f in dataclasses.fields(self):
            if f.type == "int":
                need(getattr(self, f.name) >= 0, f"{f.name} is {getattr(self, f.name)}, expected 0 or more")
        for name, value in FAMILIES[self.model_type][2].items():
            need(getattr(self, name) == value, f"{name} must be {value}, as {self.model_type!r} has it")
        need_positive(*SHAPE, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
        kind = self.model_type
        need_positive(*MLA_SHAPE * (kind in MLA), *INDEX_SHAPE * (kind == "deepseek_v32"))
        alien = {*MLA_SHAPE, "q_lora_rank", *INDEX_SHAPE, *MOE_SHAPE} & absent_fields(
            kind, "deepseek" in kind
        )
        for name in sorted(alien):
            need(not getattr(self, name), f"{name} is {getattr(self, name)}, but {kind!r} models have none")
        if self.n_routed_experts:
            need_positive(*MOE_SHAPE, "moe_layer_freq", "n_group", "topk_group")
        if problems:
            raise ConfigError("; ".join(problems))

        D, N, K = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        H, R = self.head_dim, self.qk_rope_head_dim
        own_width = kind not in _HEADS_DIVIDE and (self.is_mla or H > 0)
        need(D % N == 0 or own_width, f"hidden_size {D} is not divisible by num_attention_heads {N}")
        H = self.qk_nope_head_dim + R if self.is_mla else H or D // N
        object.__setattr__(self, "head_dim", H)
        if self.is_mla:
            need(K == N, f"num_key_value_heads {K} must equal num_attention_heads {N} in latent attention")
            need(R % 2 == 0, f"qk_rope_head_dim {R} is odd; rotary embedding needs pairs")
            need(self.q_lora_rank is None or self.q_lora_rank > 0, f"q_lora_rank is {self.q_lora_rank}")
        else:
            need(N % K == 0, f"num_attention_heads {N} is not divisible by num_key_value_heads {K}")
            need(H % 2 == 0, f"head_dim {H} is odd; rotary embedding needs pairs")
        if kind == "deepseek":
            need(H * N == D, f"head_dim {H} x num_attention_heads {N} is not hidden_size {D}")
        if self.index_topk:
            width = self.index_head_dim
            need(self.q_lora_rank is not None, "index_topk needs q_lora_rank: the indexer reads that latent")
            need(width >= R, f"index_head_dim {width} is below qk_rope_head_dim {R}")
        if self.n_routed_experts:
            E, G, Kt = self.n_routed_experts, self.n_group, self.num_experts_per_tok
            layers = self.num_hidden_layers + self.num_nextn_predict_layers
            need(
                layers * E <= _MOST_EXPERTS,
                f"{layers} layers of n_routed_experts {E} are more than {_MOST_EXPERTS:,} experts",
            )
            need(Kt <= E, f"num_experts_per_tok {Kt} is above n_routed_experts {E}")
            if self.topk_method != "greedy":
                need(E % G == 0, f"n_routed_experts {E} is not divisible by n_group {G}")
                need(self.topk_group <= G, f"topk_group {self.topk_group} is above n_group {G}")
                room = self.topk_group * (E // G)
                need(room >= Kt, f"topk_group x experts per group = {room} is below num_experts_per_tok {Kt}")
            if self.topk_method == "noaux_tc":
                need(E // G >= 2, f"noaux_tc needs 2 experts in a group; {E} in n_group {G} leave {E // G}")
        if problems:
            raise ConfigError("; ".join(problems))

    # ---------------------------------------------------------------- derived

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank > 0

    @property
    def attention(self) -> str:
        return "latent (MLA)" if self.is_mla else "grouped-query (GQA)"

    @property
    def head_axis(self) -> str:
        """Logical axis of the heads that a mesh may split."""
        return "heads" if self.is_mla else "kv_heads"

    @property
    def cache_heads(self) -> int:
        """Heads of the cache that a mesh may split; a latent serves all heads and is whole."""
        return 1 if self.is_mla else self.num_key_value_heads

    def score_width(self, absorbed: bool) -> int:
        """Multiplications per head and pair of query and key, for the score and the weighted sum of values.

        `absorbed`: as a decode step reads a latent cache (DeepSeek-V2 paper, section 2.1.2).
        """
        if self.is_mla and absorbed:
            return 2 * self.kv_lora_rank + self.qk_rope_head_dim
        return self.head_dim + (self.v_head_dim or self.head_dim)

    @property
    def attention_out_bias(self) -> bool:
        """True if the output projection has a bias too; Qwen2 has biases on queries, keys and values only."""
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def qk_norm(self) -> bool:
        """True if queries and keys are normalised per head before rotation (Qwen3)."""
        return self.model_type == "qwen3"

    @property
    def rope_dim(self) -> int:
        """Number of rotated dimensions per head."""
        return self.qk_rope_head_dim if self.is_mla else self.head_dim

    @property
    def softmax_scale(self) -> float:
        """Scale of attention scores: head_dim^-1/2, in MLA times YaRN's mscale^2 (DeepSeek-V2/V3 code)."""
        scale = self.head_dim**-0.5
        rope = self.rope
        if self.is_mla and rope.rope_type != "default" and rope.mscale_all_dim:
            scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
        return scale

    @property
    def has_router_bias(self) -> bool:
        return self.n_routed_experts > 0 and self.topk_method == "noaux_tc"

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether a layer's feed-forward is a mixture of experts (DeepseekDecoderLayer)."""
        return (
            self.n_routed_experts > 0
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token that ends a text, by config.json and by generation_config.json."""
        found = []
        for eos in (self.eos_token_id, self.generation.get("eos_token_id")):
            found += eos if isinstance(eos, list | tuple) else [eos]
        return tuple(dict.fromkeys(eos for eos in found if type(eos) is int))

    def num_params(self, mtp: bool = False) -> int:
        """Count the main model's parameters; with `mtp`, also those that only multi-token modules have."""
        return self._count(self.n_routed_experts, mtp)

    def num_active_params(self) -> int:
        """Count the parameters that one token uses, embedding and output head included."""
        return self._count(self.num_experts_per_tok, False)

    def _count(self, experts: int, mtp: bool) -> int:
        D, N, K, H, I = (
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.intermediate_size,
        )
        if self.is_mla:
            C, R, Q = self.kv_lora_rank, self.qk_rope_head_dim, self.q_lora_rank
            attn = D * Q + Q + Q * N * H if Q else D * N * H
            attn += (
                D * (C + R) + C + C * N * (self.qk_nope_head_dim + self.v_head_dim) + N * self.v_head_dim * D
            )
            if self.attention_bias:
                attn += (Q or 0) + C + R
            if self.index_topk:
                IN, IH = self.index_n_heads, self.index_head_dim
                attn += (Q or 0) * IN * IH + D * IH + 2 * IH + D * IN
        else:
            attn = 2 * D * N * H + 2 * D * K * H + (self.attention_bias and (N + 2 * K) * H)
            attn += 2 * H if self.qk_norm else 0
        attn += self.attention_out_bias and D

        def mlp(width: int) -> int:
            return 3 * D * width + (self.mlp_bias and 2 * width + D)

        dense = attn + 2 * D + mlp(I)
        E, F = self.n_routed_experts, self.moe_intermediate_size
        shared = mlp(F * self.n_shared_experts) if self.n_shared_experts else 0
        sparse = attn + 2 * D + E * D + (self.has_router_bias and E) + 3 * D * F * experts + shared
        n_sparse = sum(self.is_moe_layer(l) for l in range(self.num_hidden_layers))
        total = (self.num_hidden_layers - n_sparse) * dense + n_sparse * sparse
        total += self.vocab_size * D * (1 if self.tie_word_embeddings else 2) + D
        if mtp:
            total += self.num_nextn_predict_layers * (
                (sparse if self.n_routed_experts else dense) + 3 * D + 2 * D * D
            )
        return int(total)

    def cache_bytes_per_token(self, dtype: str = "bfloat16") -> int:
        """Return the cache bytes per token of context over all layers (DeepSeek-V2 paper, Table 1)."""
        if dtype not in _BYTES:
            raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(_BYTES)}")
        per_layer = (
            self.kv_lora_rank + self.qk_rope_head_dim
            if self.is_mla
            else 2 * self.num_key_value_heads * self.head_dim
        )
        per_layer += self.index_head_dim if self.index_topk else 0
        return self.num_hidden_layers * per_layer * _BYTES[dtype]


def absent_fields(kind: str, moe: bool) -> set[str]:
    """Return the fields that config.json lacks for this model type."""
    mla = {"head_dim"} if kind in MLA else {*MLA_SHAPE, "q_lora_rank", "rope_interleave"}
    return mla | (set() if kind == "deepseek_v32" else set(INDEX_SHAPE)) | (set() if moe else MOE_FIELDS)


# -------------------------------------------------------------------- presets


def configs_dir() -> Path:
    """Return the folder of shipped TOML files: in the wheel, or beside the package in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def presets() -> dict[str, Path]:
    """Return the shipped model presets, name to file."""
    return {p.stem: p for p in sorted((configs_dir() / "models").glob("*.toml"))}


def _read_preset(path: Path) -> dict[str, Any]:
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    base = raw.pop("same_as", None)
    return _read_preset(path.with_name(f"{base}.toml")) | raw if base else raw
