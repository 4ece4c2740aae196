"""Where arrays live: the shape legend, mesh axes, and the tables from logical names to mesh axes.

Shape legend (suffix letters are einsum letters, for arrays and parameters of the whole project):

    B batch      T query tokens   S cache slots / key tokens   D model width   V vocabulary
    N heads      K kv heads       G query heads per kv head    H head width    P head width without rope
    Q q-lora     C kv-lora        R rope width                 A = C + R       L layers
    E experts    F feed-forward width                          M rows sorted by expert

    In the router K is the number of experts that a token chooses; in latent attention H is P + R for queries
    and keys and the value width for values.

A *strategy* is a TOML file: sizes of the mesh axes, where weights rest (`[weights]`), and how each phase
(`[train]`, `[prefill]`, `[decode]`) lays out its activations and the weights it computes with. For serving,
`[weights]` may ask for `redundant_experts`, slots beyond one for each expert, and name the `placement` that
says which expert is in which. Layers know
logical names only; this file alone knows mesh axes. One sharding mode everywhere: Explicit.
"""

from __future__ import annotations

import difflib
import functools
import math
import tomllib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.experimental.layout import Format
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxseek.config import ConfigError, ModelConfig, configs_dir
from jaxseek.storage.place import Place, is_url, place

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
_MOST_DEVICES = 1 << 14  # beyond which no fitting sizes are looked for
DISPATCHES = ("local", "replicated", "all_to_all")
FACTORS = ("capacity_factor", "room_factor")  # of the rows that a dispatch takes, see layers/dispatch.py
PHASES = ("train", "prefill", "decode")
LOGICAL_AXES = (
    "batch",
    "length",
    "cache_batch",
    "cache_length",
    "embed",
    "vocab",
    "heads",
    "cache_heads",
    "kv_heads",
    "q_groups",
    "q_lora",
    "latent",
    "mlp",
    "expert",
    "expert_mlp",
)


# Where attention against a cache puts rows and heads, unless a table says so: where the rest of the layer
# has them.
_SAME = {"cache_batch": "batch", "cache_heads": "heads"}


@dataclass(frozen=True)
class Rules:
    """One table of a strategy: logical axis name to mesh axes, and the expert dispatch of the phase.

    The factors limit what an expert or a shard takes to a multiple of its even share (layers/dispatch.py).
    """

    table: tuple[tuple[str, tuple[str, ...]], ...] = ()
    dispatch: str = "local"
    capacity_factor: float | None = None
    room_factor: float | None = None

    def axes(self, name: str | None) -> tuple[str, ...]:
        """Mesh axes (of size above one) that this logical axis is split over."""
        table = dict(self.table)
        return table.get(name, table.get(_SAME.get(name, ""), ())) if name else ()

    def spec(self, *names: str | None) -> P:
        """The PartitionSpec of an array whose dimensions have these logical names."""
        return P(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in map(self.axes, names)))

    def for_cache(self) -> Rules:
        """These rules where queries meet a cache: rows and heads are where it has them."""
        moved = {name: self.axes(where) for where, name in _SAME.items()}
        return replace(self, table=tuple((dict(self.table) | moved).items()))

    def shard(self, x: jax.Array, *names: str | None) -> jax.Array:
        """Move `x` to the layout of these logical names; `x` itself where it is there already."""
        spec = self.spec(*names)
        there = NamedSharding(jax.sharding.get_abstract_mesh(), spec)
        return x if jax.typeof(x).sharding == there else jax.sharding.reshard(x, spec)

    def use(self, param: Any, dtype: Any, *axes: str | None) -> jax.Array:
        """A parameter as this phase computes with it, or by other `axes` than its own: cast first, so that a
        gather moves fewer bytes."""
        value = param[...].astype(dtype)
        return self.shard(value, *(axes or param.get_metadata("axes")))


@dataclass(frozen=True)
class Strategy:
    """Mesh sizes and rule tables; hashable, so that compiled functions are keyed by it.

    `placement` is a file that `jaxseek placement` writes. `tables` are the rules as written, with axes of any
    size, from which the same strategy is made in other sizes.
    """

    sizes: tuple[tuple[str, int], ...]
    weights: Rules
    train: Rules
    prefill: Rules
    decode: Rules
    redundant_experts: int = 0
    placement: str | None = None
    tables: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def has_slots(self) -> bool:
        """Whether experts lie in slots rather than each once and in order."""
        return bool(self.redundant_experts or self.placement)

    @property
    def num_devices(self) -> int:
        return math.prod(n for _, n in self.sizes)

    def parts(self, rules: Rules, name: str) -> int:
        """Into how many parts these rules split a logical axis."""
        return math.prod(dict(self.sizes)[a] for a in rules.axes(name))

    def make_mesh(self, devices: list[Any] | None = None) -> Mesh:
        """A mesh of Explicit axes over the first devices (all hosts' devices, in JAX's topology order).

        Raises ConfigError when there are fewer devices than the strategy needs, and when some host has none
        of those that it takes.
        """
        available = jax.devices() if devices is None else devices
        if self.num_devices > len(available):
            given = " x ".join(f"{a}={n}" for a, n in self.sizes if n > 1)
            raise ConfigError(
                f"the mesh {given} needs {self.num_devices} devices, but {len(available)} are available "
                f"({available[0].platform}); lower an axis, or set jax_num_cpu_devices to simulate more"
            )
        taken = available[: self.num_devices]
        hosts = jax.process_count() if devices is None else 1
        if len({d.process_index for d in taken}) < hosts:
            raise ConfigError(
                f"the mesh has {self.num_devices} devices, which leaves some of {hosts} hosts without one; "
                f"expected all {len(available)}, such as fsdp={len(available)}"
            )
        sizes = tuple(n for _, n in self.sizes)
        explicit = (AxisType.Explicit,) * len(sizes)
        # jax.make_mesh does not cut a torus axis in two: it has no 8 x 16 x 4 for an 8x8x8 slice
        placed = mesh_utils.create_device_mesh(sizes, taken, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=explicit)

    def abstract_mesh(self) -> AbstractMesh:
        """The same mesh with no devices, for shapes and shardings alone."""
        explicit = (AxisType.Explicit,) * len(MESH_AXES)
        return AbstractMesh(tuple(n for _, n in self.sizes), MESH_AXES, axis_types=explicit)

    def check_fits(self, cfg: ModelConfig) -> None:
        """Raise ConfigError, naming every axis that does not divide what it splits, and the nearest sizes for
        as many devices that do."""
        if self.has_slots and not cfg.n_routed_experts:
            raise ConfigError(f"a {cfg.model_type} model has no experts for [weights] redundant_experts")
        if not (problems := self.misfits(cfg)):
            return
        found = self.nearest(cfg)
        choose = "Choose another size"
        if found is not None:
            own = ",".join(f"{a}={n}" for a, n in found.items() if n > 1)
            where = f"--mesh {own}" if self.tables == _default_tables() else f"{own} in its [mesh]"
            choose = f"With as many devices, {where} fits; choose it or another size"
        raise ConfigError(
            f"the mesh does not fit the model: {'; '.join(problems)}. {choose}, or free the axis by a rule "
            "such as kv_heads = [] in the strategy's TOML"
        )

    def nearest(self, cfg: ModelConfig) -> dict[str, int] | None:
        """Sizes of as many devices with which this strategy fits the model, None where no such are there.

        They are the fewest doublings and halvings (by logarithm) away, then split the fewest axes; axes of
        these sizes come first.
        """
        if self.num_devices > _MOST_DEVICES:
            return None
        asked = dict(self.sizes)

        def distance(sizes: tuple[int, ...]) -> tuple[float, int]:
            moved = sum(abs(math.log(n / asked[a])) for a, n in zip(MESH_AXES, sizes))
            return round(moved, 6), sum(n > 1 for n in sizes)

        whole = _factorizations(self.num_devices, len(MESH_AXES))
        for sizes in sorted(whole, key=lambda sizes: (*distance(sizes), [-n for n in sizes])):
            found: dict[str, int] = dict(zip(MESH_AXES, sizes))
            try:
                strategy = replace(self._build(found, self.tables), redundant_experts=self.redundant_experts)
            except ConfigError:
                continue
            if not strategy.misfits(cfg):
                return dict(sorted(found.items(), key=lambda kv: asked[kv[0]] == 1))
        return None

    def misfits(self, cfg: ModelConfig) -> list[str]:
        """Every axis that does not divide what it splits, or splits two axes of an array, in words."""
        size = dict(self.sizes)
        dims = {
            "vocab": cfg.vocab_size,
            "embed": cfg.hidden_size,
            "kv_heads": 0 if cfg.is_mla else cfg.num_key_value_heads,
            "q_groups": 0 if cfg.is_mla else cfg.num_attention_heads // cfg.num_key_value_heads,
            "heads": cfg.num_attention_heads if cfg.is_mla else 0,
            "cache_heads": cfg.num_attention_heads if cfg.is_mla else 0,
            "q_lora": cfg.q_lora_rank or 0,
            "latent": math.gcd(cfg.q_lora_rank or 0, cfg.kv_lora_rank),
            "mlp": math.gcd(cfg.intermediate_size, cfg.moe_intermediate_size * cfg.n_shared_experts),
            "expert": cfg.n_routed_experts,
            "expert_mlp": cfg.moe_intermediate_size,
        }
        tables: dict[str, list[str]] = {}
        for where in ("weights", *PHASES):
            for name, axes in getattr(self, where).table:
                lengths = {name: dims.get(name, 0)}
                lengths |= {"redundant_experts": self.redundant_experts} if name == "expert" else {}
                for what, length in lengths.items():
                    if length % math.prod(size[a] for a in axes):
                        over = " x ".join(f"{a}={size[a]}" for a in axes)
                        tables.setdefault(f"{what} {length} is not divisible by {over}", []).append(where)
        problems = [f"{text} ([{'], ['.join(where)}])" for text, where in tables.items()]
        for where in PHASES:
            rules = getattr(self, where)
            for one, other in _together(cfg, where):
                if both := set(rules.axes(one)) & set(rules.axes(other)):
                    over = " and ".join(sorted(both))
                    problems.append(f"{one} and {other} of an array are both split over {over} ([{where}])")
        if cfg.n_routed_experts == 0 and size["expert"] > 1:
            problems.append(f"expert={size['expert']}, but the model has no routed experts")
        return problems

    @classmethod
    def from_toml(cls, path: str | Place, **sizes: int) -> Strategy:
        """Read a strategy file; tables it leaves out come from the default strategy."""
        path = place(path)
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such strategy file") from None
        except tomllib.TOMLDecodeError as e:
            raise ConfigError(f"{path}: not valid TOML ({e})") from None
        try:
            default = _default_tables()
            _check_keys(raw, ("mesh", "weights", *PHASES), "table")
            tables = {k: default[k] | raw.get(k, {}) for k in ("weights", *PHASES)}
            extra, placement = (
                tables["weights"].pop("redundant_experts", 0),
                tables["weights"].pop("placement", None),
            )
            if type(extra) is not int or extra < 0:
                raise ConfigError(f"[weights] redundant_experts is {extra!r}, expected a number of slots")
            if not isinstance(placement, str | None):
                raise ConfigError(f"[weights] placement is {placement!r}, expected a file's name")
            if placement is not None and not is_url(placement):
                placement = str(path.parent / placement)
            strategy = cls._build(raw.get("mesh", {}) | sizes, tables)
            return replace(strategy, redundant_experts=extra, placement=placement)
        except ConfigError as e:
            raise ConfigError(f"{path}: {e}") from None

    @classmethod
    def default(cls, **sizes: int) -> Strategy:
        """The default rule tables with these mesh sizes, for example `default(fsdp=4, tensor=2)`."""
        return cls._build(sizes, _default_tables())

    @classmethod
    def parse(cls, mesh: Strategy | dict[str, int] | str | Path | None) -> Strategy:
        """A strategy from what a user writes: sizes, `"tensor=4,data=2"`, a TOML path or a shipped name."""
        if isinstance(mesh, Strategy):
            return mesh
        if mesh is None:
            return cls.default()
        if isinstance(mesh, dict):
            return cls.default(**mesh)
        text = str(mesh)
        if "=" in text and not text.endswith(".toml"):
            try:
                return cls.default(
                    **{k.strip(): int(v) for k, v in (kv.split("=") for kv in text.split(","))}
                )
            except ValueError as e:
                if isinstance(e, ConfigError):
                    raise
                raise ConfigError(f"mesh is {text!r}, expected sizes such as tensor=4,data=2") from None
        shipped = configs_dir() / "meshes" / f"{text}.toml"
        return cls.from_toml(shipped if shipped.is_file() else text)

    @classmethod
    def _build(cls, sizes: dict[str, int], tables: dict[str, dict[str, Any]]) -> Strategy:
        _check_keys(sizes, MESH_AXES, "mesh axis")
        for axis, n in sizes.items():
            if not isinstance(n, int) or n < 1:
                raise ConfigError(f"mesh axis {axis} has size {n!r}, expected a positive integer")
        full = tuple((a, sizes.get(a, 1)) for a in MESH_AXES)
        weights, train, prefill, decode = (_rules(k, tables[k], dict(full)) for k in ("weights", *PHASES))
        return cls(full, weights, train, prefill, decode, tables=tables)


def _factorizations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write n as a product of so many numbers, in order."""
    if parts == 1:
        yield (n,)
        return
    for first in (d for d in range(1, n + 1) if n % d == 0):
        for rest in _factorizations(n // first, parts - 1):
            yield first, *rest


def _together(cfg: ModelConfig, phase: str) -> list[tuple[str, str]]:
    """Logical axes that are axes of one array."""
    heads = ("heads",) if cfg.is_mla else ("kv_heads", "q_groups")
    pairs = [("batch", name) for name in ("length", "vocab", *heads)] + [("length", name) for name in heads]
    if phase == "decode":
        cached = ("cache_heads",) if cfg.is_mla else heads
        pairs += [("cache_batch", name) for name in ("cache_length", *cached)]
    return pairs if cfg.is_mla else [*pairs, ("kv_heads", "q_groups")]


def _check_keys(given: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"unknown {what} {key!r}{hint}")


def _rules(where: str, raw: dict[str, Any], sizes: dict[str, int]) -> Rules:
    raw = dict(raw)
    extra = {k: raw.pop(k) for k in ("dispatch", *FACTORS) if k in raw}
    _check_keys(raw, LOGICAL_AXES, f"logical axis in [{where}]")
    table = []
    for name, axes in raw.items():
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        for axis in axes:
            if axis not in MESH_AXES:
                raise ConfigError(f"[{where}] {name} names mesh axis {axis!r}; known: {', '.join(MESH_AXES)}")
        table.append((name, tuple(a for a in axes if sizes[a] > 1)))
    rules = Rules(tuple(table), **extra)
    if rules.dispatch not in DISPATCHES:
        raise ConfigError(
            f"[{where}] dispatch is {rules.dispatch!r}, expected one of {', '.join(DISPATCHES)}"
        )
    for name in FACTORS:
        if (factor := getattr(rules, name)) is not None and not factor > 0:
            raise ConfigError(f"[{where}] {name} is {factor}, expected above 0")
    if rules.room_factor is not None and rules.dispatch != "all_to_all":
        raise ConfigError(f"[{where}] room_factor is for dispatch 'all_to_all', not {rules.dispatch!r}")
    if where != "weights" and rules.dispatch == "local" and rules.axes("expert"):
        raise ConfigError(
            f"[{where}] dispatch 'local' keeps all experts, but expert is split; use 'replicated'"
        )
    if rules.dispatch == "all_to_all" and not set(rules.axes("expert")) <= set(rules.axes("batch")):
        raise ConfigError(f"[{where}] dispatch 'all_to_all' needs batch split over the axes of expert")
    return rules


@functools.cache
def _default_tables() -> dict[str, dict[str, Any]]:
    return tomllib.loads((configs_dir() / "meshes" / "default.toml").read_text(encoding="utf-8"))


class Init:
    """Declares parameters: shape, logical axes and initial values stand on one line in the layers.

    Layers are only ever built under `jax.eval_shape`; `fill` then gives every parameter its values, be they
    random, converted or restored.
    """

    def __init__(self, strategy: Strategy, dtype: Any):
        self.rules, self.dtype = strategy.weights, dtype

    def __call__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        fill: float | None = None,
        dtype: Any = None,
        kind: type[nnx.Variable] = nnx.Param,
    ) -> nnx.Variable:
        """A parameter that starts as the constant `fill`, or else normal with `initializer_range`."""
        if len(shape) != len(axes):
            raise ValueError(f"shape {shape} and axes {axes} differ in length")
        value = jnp.zeros(shape, dtype or self.dtype, out_sharding=self.rules.spec(*axes))
        return kind(value, axes=axes, fill=fill)


def parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Every parameter by its dotted path, in a fixed order."""
    flat, _ = jax.tree.flatten_with_path(model, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return {
        ".".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path): v
        for path, v in flat
    }


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Form:
    """Of a tree: its structure, and which of the given arrays each leaf is (None: a new one)."""

    structure: Any
    given: tuple[int | None, ...]


def jit_sharing(f: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` of a function of a tree of arrays (its other arguments are static), without its copies.

    What `f` returns as it was given is the very array, which jit would copy: weights that need no move, say.
    `call.new` is the compiled part: the arrays that are new, and where they go.
    """

    @functools.partial(jax.jit, static_argnums=1)
    def new(tree: Any, static: tuple) -> tuple[list[jax.Array], _Form]:
        index = {id(a): i for i, a in enumerate(jax.tree.leaves(tree))}
        leaves, structure = jax.tree.flatten(f(tree, *static))
        given = tuple(index.get(id(a)) for a in leaves)
        return [a for a, i in zip(leaves, given) if i is None], _Form(structure, given)

    @functools.wraps(f)
    def call(tree: Any, *static: Any) -> Any:
        made, form = new(tree, static)
        old, made = jax.tree.leaves(tree), iter(made)
        return jax.tree.unflatten(form.structure, [next(made) if i is None else old[i] for i in form.given])

    call.new = new  # type: ignore[attr-defined]
    return call


def fill(model: Any, mesh: Mesh, make: Callable[[str, nnx.Variable, NamedSharding], jax.Array]) -> Any:
    """An abstract model with every parameter's value made by `make(path, abstract parameter, sharding)`."""
    made = []
    for path, param in parameters(model).items():
        made.append(make(path, param, NamedSharding(mesh, param.get_value().sharding.spec)))
    return jax.tree.unflatten(jax.tree.structure(model), made)


def random_values(seed: int, std: float) -> Callable[[str, nnx.Variable, NamedSharding], jax.Array]:
    """For `fill`: initial values drawn on the host, each layer's and expert's from a stream of its own.

    They are the same on every mesh, and a shard draws only the matrices that it holds.
    """

    def make(path: str, param: nnx.Variable, sharding: NamedSharding) -> jax.Array:
        abstract, axes = param.get_value(), param.get_metadata("axes")
        shape, dtype = abstract.shape, abstract.dtype
        constant = param.get_metadata("fill")
        lead = len(shape) - len(axes) + (axes[0] == "expert")
        name = zlib.crc32(path.encode())

        def shard(index: Any) -> np.ndarray:
            sizes = [len(range(n)[i]) for n, i in zip(shape, index)]
            if constant is not None:
                return np.full(sizes, constant, dtype)
            out = np.empty(sizes, dtype)
            for at in np.ndindex(*sizes[:lead]):
                which = [range(n)[i][j] for n, i, j in zip(shape, index, at)]
                rng = np.random.default_rng([seed, name, *which])
                out[at] = (std * rng.standard_normal(shape[lead:], np.float32))[index[lead:]]
            return out

        return jax.make_array_from_callback(shape, sharding, shard)

    return make


def in_formats(tree: Any, formats: Any, donate: bool = False) -> Any:
    """Arrays in these layouts; what is in its own already is returned as it is.

    `jax.device_put` does not take a layout for an array of which other hosts hold parts.
    """

    def moved(a: Any, wanted: Format) -> jax.Array:
        if a.format == wanted:
            return a
        if a.is_fully_addressable:
            return jax.device_put(a, wanted, donate=donate)
        new = _copy_to(wanted)(a)
        if donate:
            jax.block_until_ready(new)
            a.delete()
        return new

    return jax.tree.map(moved, tree, formats)


@functools.cache
def _copy_to(wanted: Format) -> Any:
    return jax.jit(lambda a: a, out_shardings=wanted)


def device_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays, abstract or not, on one device; int4 is two to a byte, no tile is padded."""
    total = 0
    for a in jax.tree.leaves(tree):
        bits = 4 if a.dtype.name in ("int4", "uint4") else 8 * a.dtype.itemsize
        total += math.prod(a.sharding.shard_shape(a.shape)) * bits // 8
    return total


def platform() -> str:
    """Of the devices of the mesh in use ("cpu", "tpu", ...), also when compiling for devices elsewhere.

    Kernels choose their implementation by it: `jax.lax.platform_dependent` would trace them all.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
