"""A first estimate of a Job from its config and strategy alone: nothing is traced or compiled.

It says what must fit and what time cannot be less than, and by how much a strategy moves data. Good enough to
throw out most strategies before the compiler sees them; not to choose between good ones.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp

from jaxseek.config import ConfigError, ModelConfig
from jaxseek.lab.chips import HOP_SECONDS, Topology
from jaxseek.lab.job import Job, job_weights
from jaxseek.model import DeepSeek
from jaxseek.run_config import LoraConfig
from jaxseek.sharding import Rules, Strategy, parameters
from jaxseek.train.lora import LoraParam, adapt


@dataclass(frozen=True)
class Estimate:
    """Of one device and one step: bytes that it holds; seconds that reading HBM, multiplying, and moving data
    between chips take at the least; bytes that the collectives bring."""

    weights: float
    cache: float
    optimizer: float
    hbm_seconds: float
    flops_seconds: float
    collective_seconds: float
    collective_bytes: float

    @property
    def held(self) -> float:
        return self.weights + self.cache + self.optimizer

    @property
    def limit(self) -> float:
        """The roofline: no step is shorter."""
        return max(self.hbm_seconds, self.flops_seconds)

    @property
    def seconds(self) -> float:
        """With collectives that nothing hides."""
        return self.limit + self.collective_seconds


@dataclass(frozen=True)
class _Param:
    name: str
    shape: tuple[int, ...]
    bits: int
    axes: tuple[str | None, ...]
    trained: bool

    @property
    def bytes(self) -> float:
        return math.prod(self.shape) * self.bits / 8


@functools.lru_cache(maxsize=16)
def _parameters(cfg: ModelConfig, train: bool, weights: str, lora: int) -> tuple[_Param, ...]:
    whole = jnp.float32 if train and not lora else jnp.bfloat16
    model = job_weights(DeepSeek.abstract(cfg, None, whole), weights)
    model = adapt(model, LoraConfig(lora), 0) if lora else model
    found = []
    for path, param in parameters(model).items():
        value, axes = param.get_value(), param.get_metadata("axes")
        bits = 4 if value.dtype.name in ("int4", "uint4") else 8 * value.dtype.itemsize
        names = [part for part in path.split(".") if part not in ("value", "scale", "base")]
        axes = (*(None,) * (len(value.shape) - len(axes)), *axes)
        found.append(_Param(names[-1], value.shape, bits, axes, not lora or isinstance(param, LoraParam)))
    return tuple(found)


def first_pass(job: Job) -> Estimate:
    """The estimate of a job."""
    cfg, strategy, rules, chip = job.cfg, job.strategy, job.rules, job.topology.chip.device
    train, decode = job.trains, job.phase == "decode"
    params = _parameters(cfg, train, job.weights, job.lora)
    touched = _touched_experts(job)
    weights = read = gathered = optimizer = 0.0
    gathers = 0
    for p in params:
        at_rest, used = (p.bytes / _parts(p, r, strategy) for r in (strategy.weights, rules))
        weights += at_rest
        if train and p.trained:  # two moments, in bfloat16 where all is trained
            optimizer += at_rest * (2 if job.lora else 1)
        looked_up = p.name == "embed_VD" and not cfg.tie_word_embeddings
        read += 0 if looked_up else used * (touched if "expert" in p.axes else 1.0)
        if used > at_rest:
            moved = used * 16 / p.bits if train else used  # cast to bfloat16 before it is gathered
            gathered += moved * (3 if train else 1)  # forward, backward, and the gradient back
            gathers += 3 if train else 1
    rows, slots = (
        -(-n // strategy.parts(rules, a))
        for n, a in ((job.batch, "cache_batch"), (job.context, "cache_length"))
    )
    heads = 1 if cfg.is_mla else strategy.parts(rules, "kv_heads")
    cache = 0.0 if train else rows * slots * cfg.cache_bytes_per_token("bfloat16") / heads
    moved, turns = _layer_traffic(job)
    moved, turns = moved + gathered, turns + gathers
    traffic = 2 * weights + 2 * optimizer if train else read + cache * (decode or 0.5)
    widest = max((n for _, n in strategy.sizes), default=1)
    return Estimate(
        weights=weights,
        cache=cache,
        optimizer=optimizer,
        hbm_seconds=traffic / chip.hbm_bandwidth,
        flops_seconds=_flops(job) / strategy.num_devices / chip.peak["bf16"],
        collective_seconds=moved / (2 * chip.link_bandwidth) + turns * HOP_SECONDS * min(widest, 8),
        collective_bytes=moved,
    )


def _parts(p: _Param, rules: Rules, strategy: Strategy) -> int:
    """Into how many parts these rules split a parameter; of a scale, axes of size one stay whole."""
    split = {a for name, n in zip(p.axes, p.shape) if n > 1 for a in rules.axes(name)}
    return math.prod(dict(strategy.sizes)[a] for a in split)


def _touched_experts(job: Job) -> float:
    """The share of a device's experts that a step needs, if every token chose at random."""
    cfg, rules = job.cfg, job.rules
    if not cfg.n_routed_experts:
        return 1.0
    seen_by = [a for a in rules.axes("batch") if a not in rules.axes("expert")]
    tokens = job.tokens / math.prod(dict(job.strategy.sizes)[a] for a in seen_by)
    return 1 - (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** tokens


def _flops(job: Job) -> float:
    """Of the whole step: two per weight that a token uses, and attention; backward is twice as much."""
    cfg, n = job.cfg, job.context
    heads = cfg.num_attention_heads
    if not cfg.is_mla:
        width = 2 * cfg.head_dim
    elif job.phase == "decode":  # absorbed: scores over latent and rope, sums over the latent
        width = 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
    else:
        width = cfg.head_dim + cfg.v_head_dim
    seen = n if job.phase == "decode" else n / 2
    per_token = 2 * cfg.num_active_params() + 2 * cfg.num_hidden_layers * heads * width * seen
    passes = 1 if not job.trains else 2 if job.lora else 3  # gradients of frozen weights are not wanted
    return job.tokens * per_token * passes


def _layer_traffic(job: Job) -> tuple[float, int]:
    """Bytes that a device receives for activations in bfloat16, and collectives, over all layers."""
    cfg, strategy, rules = job.cfg, job.strategy, job.rules
    rows = job.batch / strategy.parts(rules, "batch")
    length = 1 if job.phase == "decode" else job.context / strategy.parts(rules, "length")
    x = rows * length * cfg.hidden_size * 2
    backward = 2 if job.trains else 1
    sparse = sum(map(cfg.is_moe_layer, range(cfg.num_hidden_layers)))
    dense = cfg.num_hidden_layers - sparse
    heads = strategy.parts(rules, "heads" if cfg.is_mla else "kv_heads")
    moved, turns = 0.0, 0

    def all_reduce(n: int, layers: int, scale: float = 1.0) -> None:
        nonlocal moved, turns
        if n > 1:
            moved += 2 * x * scale * (n - 1) / n * layers * backward
            turns += layers * backward

    all_reduce(heads, cfg.num_hidden_layers)
    all_reduce(strategy.parts(rules, "mlp"), dense + (sparse if cfg.n_shared_experts else 0))
    experts, width = strategy.parts(rules, "expert"), strategy.parts(rules, "expert_mlp")
    if rules.dispatch == "all_to_all" and experts > 1:
        moved += 2 * x * min(cfg.num_experts_per_tok, experts) * sparse * backward
        turns += 2 * sparse * backward
        all_reduce(width, sparse, float(cfg.num_experts_per_tok))
    else:
        shared = [a for a in rules.axes("batch") if a in rules.axes("expert")]
        gathered = math.prod(dict(strategy.sizes)[a] for a in shared)
        all_reduce(experts * width, sparse, gathered)
    return moved, turns


# -------------------------------------------------------------------- sizes


def candidates(
    cfg: ModelConfig, topology: Topology, workload: str, batch: int, context: int, weights: str, lora: int = 0
) -> Iterator[Job]:
    """Jobs with the default rule tables and every split of the slice into mesh axes that fits them."""
    devices = topology.num_devices
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for fsdp, expert, tensor, context_axis in itertools.product(divisors, repeat=4):
        if fsdp * expert * tensor * context_axis != devices:
            continue
        sizes = {"fsdp": fsdp, "expert": expert, "tensor": tensor, "context": context_axis}
        try:
            yield Job(cfg, Strategy.default(**sizes), topology, workload, batch, context, weights, lora)
        except ConfigError:
            continue


def sensible(
    cfg: ModelConfig, topology: Topology, workload: str, batch: int, context: int, weights: str, lora: int = 0
) -> Job:
    """The default rule tables with the sizes of the least estimated step that fits. Raises ConfigError."""
    jobs = list(candidates(cfg, topology, workload, batch, context, weights, lora))
    if not jobs:
        raise ConfigError(
            f"no sizes of the default strategy's axes fit the model, batch {batch} and context {context} on "
            f"{topology.name}; give --mesh"
        )
    usable = topology.chip.device.usable

    def rank(job: Job) -> tuple[bool, float]:
        found = first_pass(job)
        crowded = found.held > 0.95 * usable
        return crowded, found.held if crowded else found.seconds

    return min(jobs, key=rank)
