"""Estimate a Job from its config and strategy alone, without tracing or compiling.

The estimate gives the memory that must fit, a lower bound on time, and the traffic of a strategy. It is good
enough to discard most strategies before the compiler sees them, but not to choose between good ones.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxseek.config.model import ConfigError, ModelConfig, configs_dir
from jaxseek.config.run import LoraConfig
from jaxseek.experts.balance import Placement, contiguous, serve
from jaxseek.experts.replicate import experts_of_slots
from jaxseek.hardware import HOP_SECONDS, Topology
from jaxseek.lab.job import Job, job_weights
from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.weight import LoraParam
from jaxseek.ops.chosen_experts import touched_share
from jaxseek.sharding.parameters import parameters
from jaxseek.sharding.rules import Rules
from jaxseek.sharding.strategy import Strategy
from jaxseek.train.lora import adapt


@dataclass(frozen=True)
class Estimate:
    """Memory and time of one step on one device; sizes in bytes, times in seconds.

    `hbm_seconds`, `flops_seconds` and `collective_seconds` are lower bounds for reading HBM, for arithmetic
    and for communication; `collective_bytes` are the bytes that collectives receive. A decode step adds two
    costs beyond the roofline: `expert_seconds` (all devices wait for the one that reads the most experts, and
    few columns per expert leave the matrix unit idle) and `small_seconds` (small operations).
    """

    weights: float
    cache: float
    optimizer: float
    hbm_seconds: float
    flops_seconds: float
    collective_seconds: float
    expert_seconds: float
    small_seconds: float
    collective_bytes: float

    @property
    def held(self) -> float:
        """Bytes resident on the device: weights, cache and optimizer state."""
        return self.weights + self.cache + self.optimizer

    @property
    def limit(self) -> float:
        """Roofline seconds: no step is shorter."""
        return max(self.hbm_seconds, self.flops_seconds)

    @property
    def seconds(self) -> float:
        """Estimated seconds of a step: no overlap of collectives, and the costs beyond the roofline."""
        return self.limit + self.collective_seconds + self.expert_seconds + self.small_seconds


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
def _parameters(cfg: ModelConfig, train: bool, weights: str, lora: int, redundant: int) -> tuple[_Param, ...]:
    whole = jnp.float32 if train and not lora else jnp.bfloat16
    model = job_weights(DeepSeek.abstract(cfg, None, whole), weights)
    model = adapt(model, LoraConfig(lora), 0) if lora else model
    found = []
    for path, param in parameters(model).items():
        value, axes = param.get_value(), param.get_metadata("axes")
        bits = 4 if value.dtype.name in ("int4", "uint4") else 8 * value.dtype.itemsize
        names = [part for part in path.split(".") if part not in ("value", "scale", "base")]
        axes = (*(None,) * (len(value.shape) - len(axes)), *axes)
        shape = tuple(n + redundant * (a == "expert") for n, a in zip(value.shape, axes))
        found.append(_Param(names[-1], shape, bits, axes, not lora or isinstance(param, LoraParam)))
    return tuple(found)


def first_pass(job: Job) -> Estimate:
    """Estimate a job."""
    cfg, strategy, rules, chip = job.cfg, job.strategy, job.rules, job.topology.chip.device
    train, decode = job.trains, job.phase == "decode"
    params = _parameters(cfg, train, job.weights, job.lora, strategy.redundant_experts)
    touched, most = touched_experts(job)
    weights = read = optimizer = experts = 0.0
    traffic = _layer_traffic(job)
    for p in params:
        at_rest, used = (p.bytes / _parts(p, r, strategy) for r in (strategy.weights, rules))
        weights += at_rest
        if train and p.trained:  # two moments, as large as a float32 parameter
            optimizer += at_rest * (2 if job.float32_moments else 1)
        looked_up = p.name == "embed_VD" and not cfg.tie_word_embeddings
        read += 0 if looked_up else used * (touched if "expert" in p.axes else 1.0)
        experts += (
            used * (most * _compute_over_read(job, p.bits) - touched)
            if decode and "expert" in p.axes
            else 0.0
        )
        if used > at_rest:
            moved = used * 16 / p.bits if train else used  # cast to bfloat16 before it is gathered
            times = 3 if train else 1  # gather for forward and backward, then reduce the gradient
            traffic.add(moved * times, round(used / at_rest), times)
    rows, slots = (
        -(-n // strategy.parts(rules, a))
        for n, a in ((job.batch, "cache_batch"), (job.context, "cache_length"))
    )
    heads = min(cfg.cache_heads, strategy.parts(rules, "kv_heads"))
    cache = 0.0 if train else rows * slots * cfg.cache_bytes_per_token("bfloat16") / heads
    touches = 2 * weights + 2 * optimizer if train else read + cache * (decode or 0.5)
    return Estimate(
        weights=weights,
        cache=cache,
        optimizer=optimizer,
        hbm_seconds=touches / chip.hbm_bandwidth,
        flops_seconds=_flops(job) / strategy.num_devices / chip.peak["bf16"],
        collective_seconds=traffic.seconds * job.microbatches,
        expert_seconds=experts / chip.hbm_bandwidth,
        small_seconds=_small_operations(job) * chip.operation_cycles / chip.clock,
        collective_bytes=traffic.bytes * job.microbatches,
    )


def _parts(p: _Param, rules: Rules, strategy: Strategy) -> int:
    """Number of parts into which the rules split a parameter; axes of size one (in scales) stay whole."""
    split = {a for name, n in zip(p.axes, p.shape) if n > 1 for a in rules.axes(name)}
    return math.prod(dict(strategy.sizes)[a] for a in split)


def touched_experts(job: Job) -> tuple[float, float]:
    """Share of a device's experts that a step reads: on average, and on the device that reads the most.

    Assumes uniformly random routing.
    """
    cfg, rules = job.cfg, job.rules
    if not cfg.n_routed_experts:
        return 1.0, 1.0
    seen_by = [a for a in rules.axes("batch") if a not in rules.axes("expert")]
    tokens = job.tokens / math.prod(dict(job.strategy.sizes)[a] for a in seen_by)
    slots = cfg.n_routed_experts + job.strategy.redundant_experts
    share = touched_share(cfg.n_routed_experts, slots, cfg.num_experts_per_tok, tokens)
    groups = job.strategy.parts(rules, "expert")
    return share, max(share, _most_touched(cfg, job.strategy, tokens, groups))


@functools.lru_cache(maxsize=64)
def _most_touched(cfg: ModelConfig, strategy: Strategy, tokens: float, groups: int) -> float:
    """Share of its experts that the busiest group of devices reads, averaged over 200 random layers."""
    experts, chosen = cfg.n_routed_experts, cfg.num_experts_per_tok
    if groups == 1 or tokens * chosen > 16 * experts:  # a single group, or every expert is read
        return 0.0
    placement = contiguous(1, experts, groups)
    if strategy.has_slots:
        placement = Placement.of(experts_of_slots(cfg, strategy), experts)
    layers, slots = placement.expert_LS.shape
    steps = -(-200 // layers)
    scores = np.random.default_rng(0).random((steps * layers, math.ceil(tokens), experts), np.float32)
    ids = np.argpartition(scores, chosen - 1, axis=-1)[..., :chosen].reshape(steps * layers, -1)
    load_TLE = np.stack([np.bincount(each, minlength=experts) for each in ids])
    _, read_TLD = serve(load_TLE.reshape(steps, layers, experts), placement, groups)
    return float(read_TLD.max(-1).mean() * groups / slots)


def _compute_over_read(job: Job, bits: int) -> float:
    """Ratio (at least 1) of the time to multiply an expert's columns to the time to read them.

    Columns are padded to the matrix unit as in ops/chosen_experts.py.
    """
    chip = job.topology.chip.device
    columns = job.cfg.moe_intermediate_size / job.strategy.parts(job.rules, "expert_mlp")
    rows, least = (64, 64) if job.tokens <= 16 else (112, 128)
    seconds = 2 * rows * max(1.0, least / columns) / chip.peak["bf16"]
    return max(1.0, seconds * chip.hbm_bandwidth * 8 / bits)


def _fused(job: Job) -> tuple[bool, bool]:
    """Return whether a decode step runs (attention, experts) in the fused kernels of decode/fused.py.

    Mirrors the conditions stated there.
    """
    cfg, rules = job.cfg, job.rules
    whole = job.phase == "decode" and not rules.axes("batch") and not rules.axes("length")
    heads = rules.axes("cache_heads") + rules.axes("cache_batch")
    latent = cfg.is_mla and bool(cfg.q_lora_rank) and rules.axes("heads") == heads
    lies = set(rules.axes("mlp")) == {*rules.axes("expert_mlp"), *rules.axes("expert")}
    return whole and latent, whole and cfg.n_routed_experts > 0 and (lies or not cfg.n_shared_experts)


def _small_operations(job: Job) -> int:
    """Number of small operations in a decode step, 0 in other phases.

    A layer outside the fused kernels is about 70 XLA operations, most of which take the minimum time of an
    operation (docs/lab.md).
    """
    if job.phase != "decode":
        return 0
    return job.cfg.num_hidden_layers * (10 + sum(0 if served else 30 for served in _fused(job)))


def _flops(job: Job) -> float:
    """FLOPs of the step: two per weight that a token uses, plus attention; backward costs twice forward."""
    cfg, n = job.cfg, job.context
    heads, width = cfg.num_attention_heads, cfg.score_width(absorbed=job.phase == "decode")
    seen = n if job.phase == "decode" else n / 2
    per_token = 2 * cfg.num_active_params() + 2 * cfg.num_hidden_layers * heads * width * seen
    passes = 1 if not job.trains else 2 if job.lora else 3  # LoRA computes no gradients of frozen weights
    return job.tokens * per_token * passes


class _Traffic:
    """Accumulates the collectives of a step: bytes received by a device, and seconds."""

    def __init__(self, topology: Topology):
        self.topology, self.bytes, self.seconds = topology, 0.0, 0.0

    def add(self, received: float, n: int, times: float) -> None:
        """Add `times` collectives among `n` devices that receive `received` bytes in total."""
        if n > 1:
            links, hops = self.links_and_hops(n)
            self.bytes += received
            self.seconds += (
                received / (links * self.topology.chip.link_bandwidth) + times * hops * HOP_SECONDS
            )

    def all_reduce(self, operand: float, n: int, times: float) -> None:
        """Add all-reduces: in two phases, or by passing every operand round the ring where that is faster."""
        links, hops = self.links_and_hops(n)
        speed = links * self.topology.chip.link_bandwidth
        two = 2 * operand * (n - 1) / n
        round_ = two + speed * 2 * hops * HOP_SECONDS > operand * (n - 1) + speed * hops * HOP_SECONDS
        self.add(times * (operand * (n - 1) if round_ else two), n, times * (1 if round_ else 2))

    def links_and_hops(self, n: int) -> tuple[int, int]:
        """Return the links a device can use among `n` devices, and the hops of the longest route.

        The devices fill one torus axis after another.
        """
        links = hops = 0
        for axis, size in enumerate(self.topology.dims):
            part = min(n, size)
            if part > 1:
                ring = part == size and self.topology.wraps(axis)
                links, hops = links + (2 if ring else 1), hops + (part // 2 if ring else part - 1)
                n = -(-n // part)
        return max(links, 1), hops


def _layer_traffic(job: Job) -> _Traffic:
    """Collectives on bfloat16 activations, summed over all layers."""
    cfg, strategy, rules, traffic = job.cfg, job.strategy, job.rules, _Traffic(job.topology)
    rows = job.batch / strategy.parts(rules, "batch")
    length = 1 if job.phase == "decode" else job.context / strategy.parts(rules, "length")
    x = rows * length * cfg.hidden_size * 2
    backward = 2 if job.trains else 1
    sparse = sum(map(cfg.is_moe_layer, range(cfg.num_hidden_layers)))
    dense = cfg.num_hidden_layers - sparse
    heads = strategy.parts(rules, cfg.head_axis)
    together = _fused(job)[1]  # shared and routed experts share one all-reduce

    traffic.all_reduce(x, heads, cfg.num_hidden_layers * backward)
    shared = sparse if cfg.n_shared_experts and not together else 0
    traffic.all_reduce(x, strategy.parts(rules, "mlp"), (dense + shared) * backward)
    experts, width = strategy.parts(rules, "expert"), strategy.parts(rules, "expert_mlp")
    if rules.exchanges:
        moved = 2 * x * min(cfg.num_experts_per_tok, experts) * sparse * backward
        traffic.add(moved, experts, 2 * sparse * backward)
        traffic.all_reduce(x * cfg.num_experts_per_tok, width, sparse * backward)
    else:
        both = [a for a in rules.axes("batch") if a in rules.axes("expert")]
        gathered = math.prod(dict(strategy.sizes)[a] for a in both)
        traffic.all_reduce(x * gathered, experts * width, sparse * backward)
    if job.phase == "decode" and cfg.is_mla:
        _add_cache_traffic(job, rows, traffic)
    return traffic


def _add_cache_traffic(job: Job, rows: float, traffic: _Traffic) -> None:
    """Add the collectives that send queries to the shards of the latent cache, and partial sums back."""
    cfg, strategy, rules = job.cfg, job.strategy, job.rules
    layers, head = cfg.num_hidden_layers, (2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim) * 2
    queries = rows * cfg.num_attention_heads / strategy.parts(rules, "heads") * head
    moved = strategy.parts(rules, "cache_batch") // strategy.parts(rules, "batch")
    traffic.add(layers * queries, moved, 2 * layers)
    latents, slots = strategy.parts(rules, "q_lora"), strategy.parts(rules, "cache_length")
    traffic.add(layers * rows * (cfg.q_lora_rank or 0) * 2, latents, layers)
    at = cfg.num_attention_heads * job.batch / strategy.parts(rules, "cache_batch")
    at /= strategy.parts(rules, "cache_heads")
    traffic.all_reduce(at * 4, slots, layers)  # the maximum score, then the log-sum-exp combine
    traffic.all_reduce(at * (cfg.kv_lora_rank + 1) * 4, slots, layers)


# -------------------------------------------------------------------- sizes


# Shipped rule tables with free mesh sizes, and the mesh axes that each uses.
TABLES = {
    "default": ("fsdp", "expert", "tensor", "context"),
    "spread": ("fsdp", "expert", "tensor", "context"),
    "attention-data-parallel": ("fsdp", "expert", "tensor", "context"),
    "all-rows": ("data", "expert", "tensor", "context"),
    "all-rows-own-cache": ("data", "expert", "tensor"),
}


def candidates(
    cfg: ModelConfig, topology: Topology, workload: str, batch: int, context: int, weights: str, lora: int = 0
) -> Iterator[tuple[str, Job]]:
    """Yield (name, job) for each shipped rule table and each split of the slice into mesh axes that fits."""
    devices = topology.num_devices
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for table, axes in TABLES.items():
        path = configs_dir() / "meshes" / f"{table}.toml"
        if table.startswith("all-rows") and not cfg.is_mla:
            continue
        for split in itertools.product(divisors, repeat=len(axes)):
            if math.prod(split) != devices:
                continue
            sizes = dict(zip(axes, split))
            name = f"{table} " + ",".join(f"{a}={n}" for a, n in sizes.items() if n > 1)
            try:
                strategy = Strategy.from_toml(path, **sizes)
                if strategy.misfits(cfg):
                    continue
                yield name.strip(), Job(cfg, strategy, topology, workload, batch, context, weights, lora)
            except ConfigError:
                continue


def sensible(
    cfg: ModelConfig, topology: Topology, workload: str, batch: int, context: int, weights: str, lora: int = 0
) -> tuple[str, Job]:
    """Return the candidate with the shortest estimated step that fits, with its name.

    Only decoding considers tables other than the default one, since those are made for decoding. Raises
    ConfigError if no mesh sizes fit.
    """
    found = list(candidates(cfg, topology, workload, batch, context, weights, lora))
    jobs = [(name, j) for name, j in found if j.phase == "decode" or name.split()[0] == "default"]
    if not jobs:
        raise ConfigError(
            f"no sizes of the shipped rule tables' axes fit the model, batch {batch} and context {context} "
            f"on {topology.name}; give --mesh"
        )
    usable = topology.chip.device.usable

    def rank(named: tuple[str, Job]) -> tuple[bool, float]:
        found = first_pass(named[1])
        crowded = found.held > 0.95 * usable
        return crowded, found.held if crowded else found.seconds

    return min(jobs, key=rank)
