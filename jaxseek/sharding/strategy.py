"""Strategies: mesh sizes and rule tables from a TOML file or a few sizes, checked against a model."""

from __future__ import annotations

import difflib
import functools
import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxseek.config.model import ConfigError, ModelConfig, configs_dir
from jaxseek.sharding.rules import DISPATCHES, FACTORS, LOGICAL_AXES, MESH_AXES, PHASES, Rules
from jaxseek.storage.place import Place, is_url, place
from jaxseek.storage.untrusted import read_toml

_MOST_DEVICES = 1 << 14  # check_fits suggests no sizes for larger meshes


@dataclass(frozen=True)
class Strategy:
    """Mesh sizes and rule tables; hashable, so that it can be a key of compiled functions.

    `placement` is a file written by `jaxseek placement`. `tables` are the rules as written, from which the
    same strategy can be built with other sizes.
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
        """True if experts lie in slots, rather than each once and in order."""
        return bool(self.redundant_experts or self.placement)

    @property
    def num_devices(self) -> int:
        return math.prod(n for _, n in self.sizes)

    def parts(self, rules: Rules, name: str) -> int:
        """Number of parts into which these rules split a logical axis."""
        return math.prod(dict(self.sizes)[a] for a in rules.axes(name))

    def make_mesh(self, devices: list[Any] | None = None) -> Mesh:
        """Make a mesh of Explicit axes over the first devices (of all hosts, in JAX's topology order).

        Raises ConfigError if there are fewer devices than the strategy needs, or if it takes none of some
        host.
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
        # jax.make_mesh cannot split a torus axis, as 8 x 16 x 4 on an 8x8x8 slice needs
        placed = mesh_utils.create_device_mesh(sizes, taken, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=explicit)

    def abstract_mesh(self) -> AbstractMesh:
        """Return the same mesh without devices, for shapes and shardings alone."""
        explicit = (AxisType.Explicit,) * len(MESH_AXES)
        return AbstractMesh(tuple(n for _, n in self.sizes), MESH_AXES, axis_types=explicit)

    def check_fits(self, cfg: ModelConfig) -> None:
        """Raise ConfigError unless the strategy fits the model.

        The message names every axis that does not divide what it splits, and the nearest sizes that fit as
        many devices.
        """
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
        """Return the nearest sizes for as many devices with which this strategy fits the model, or None.

        Nearest means the fewest doublings and halvings (by logarithm), then the fewest split axes. Axes that
        this strategy splits come first in the result.
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
        """Describe every axis that does not divide what it splits, or that splits two axes of one array."""
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
            for one, other in _axes_of_one_array(cfg, where):
                if both := set(rules.axes(one)) & set(rules.axes(other)):
                    over = " and ".join(sorted(both))
                    problems.append(f"{one} and {other} of an array are both split over {over} ([{where}])")
        if cfg.n_routed_experts == 0 and size["expert"] > 1:
            problems.append(f"expert={size['expert']}, but the model has no routed experts")
        return problems

    @classmethod
    def from_toml(cls, path: str | Place, **sizes: int) -> Strategy:
        """Read a strategy file; what it leaves out comes from the default strategy. Raises ConfigError."""
        path = place(path)
        try:
            raw = read_toml(path, ConfigError)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such strategy file") from None
        try:
            default = _default_tables()
            _check_keys(raw, ("mesh", "weights", *PHASES), "table")
            for name, value in raw.items():
                if not isinstance(value, dict):
                    raise ConfigError(f"{name} is {value!r}, expected a table [{name}]")
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
        """Build the default rule tables with these mesh sizes, for example `default(fsdp=4, tensor=2)`."""
        return cls._build(sizes, _default_tables())

    @classmethod
    def parse(cls, mesh: Strategy | dict[str, int] | str | Path | None) -> Strategy:
        """Build a strategy from user input: sizes, `"tensor=4,data=2"`, a TOML path or a shipped name.

        Raises ConfigError.
        """
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
            if type(n) is not int or n < 1:
                raise ConfigError(f"mesh axis {axis} has size {n!r}, expected a positive integer")
        full = tuple((a, sizes.get(a, 1)) for a in MESH_AXES)
        weights, train, prefill, decode = (_rules(k, tables[k], dict(full)) for k in ("weights", *PHASES))
        return cls(full, weights, train, prefill, decode, tables=tables)


def _factorizations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield every ordered way to write n as a product of `parts` numbers."""
    if parts == 1:
        yield (n,)
        return
    for first in (d for d in range(1, n + 1) if n % d == 0):
        for rest in _factorizations(n // first, parts - 1):
            yield first, *rest


def _axes_of_one_array(cfg: ModelConfig, phase: str) -> list[tuple[str, str]]:
    """Return the pairs of logical axes that appear together in some array."""
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
        axes = [axes] if isinstance(axes, str) else axes
        if not isinstance(axes, list | tuple):
            raise ConfigError(f"[{where}] {name} is {axes!r}, expected a mesh axis or a list of them")
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
        factor = getattr(rules, name)
        if factor is not None and (type(factor) not in (int, float) or not factor > 0):
            raise ConfigError(f"[{where}] {name} is {factor!r}, expected a number above 0")
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
