"""Steps that the lab compiles for a slice, and the abstract arguments they are called with.

Each step is the one that runs in production: the engine's prefill and decode, the trainer's optimizer step.
Nothing is remodelled here, and nothing is allocated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxseek.config.formats import FORMATS
from jaxseek.config.model import ConfigError, ModelConfig
from jaxseek.config.run import RunConfig
from jaxseek.decode import plain, tpu
from jaxseek.engine import programs, slots
from jaxseek.engine.engine import Room
from jaxseek.engine.sampling import Sampling, SamplingArrays
from jaxseek.engine.scheduler import chunks, lanes
from jaxseek.experts.replicate import place_experts, refuse_slots
from jaxseek.hardware import Topology
from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.weight import is_adapted, quantize_abstract
from jaxseek.rl.objective import PolicyLoss, make_logprobs
from jaxseek.rl.packing import MOST_IN_A_ROW, PolicyBatch
from jaxseek.rl.rollout import as_in_decode, at_a_time, cast, in_decode
from jaxseek.sharding.parameters import device_bytes, fill
from jaxseek.sharding.rules import Rules
from jaxseek.sharding.strategy import Strategy
from jaxseek.train import lora
from jaxseek.train.batch import Batch, make_batch
from jaxseek.train.loss import Loss, StepInputs
from jaxseek.train.optimizer import decays, make_optimizer
from jaxseek.train.pretrain import LanguageLoss
from jaxseek.train.step import State, make_step, trained

WORKLOADS = ("decode", "prefill", "train", "rollout", "grpo")
# The other programs of a GRPO step: lay the policy out for decoding, prefill prompts, give their answers
# batch slots, and compute log-probs.
OF_GRPO = ("lay out", "read", "seat", "log-probs")
WEIGHTS = ("bf16", *FORMATS)
TOKENS_PER_DISPATCH = 32  # the engine's default


@dataclass(frozen=True)
class Job:
    """One program to compile for `batch` sequences of `context` tokens, in the cache or as input.

    The cache holds them for decode and rollout. Training keeps weights in float32 and moments in bfloat16 and
    computes in bfloat16, as the trainer does with DeepSeek-V3's run file. `grpo` is the update on sampled
    answers, one row of `context` tokens each. With `lora` only adapters of that rank are trained, on bfloat16
    weights. A `run` states all of this itself, and `batch` is then the rows of a microbatch. All workloads
    but `train` drop the multi-token-prediction module, as `convert --no-mtp` does. Raises ConfigError for
    settings that do not go together.
    """

    cfg: ModelConfig
    strategy: Strategy
    topology: Topology
    workload: str
    batch: int
    context: int
    weights: str = "bf16"
    lora: int = 0
    remat: str = "full"
    run: RunConfig | None = None

    def __post_init__(self) -> None:
        if self.run is not None:
            object.__setattr__(self, "lora", self.run.lora.rank)
            object.__setattr__(self, "remat", self.run.remat)
        if self.workload not in WORKLOADS + OF_GRPO:
            raise ConfigError(f"workload {self.workload!r}: expected one of {', '.join(WORKLOADS)}")
        if self.weights not in WEIGHTS:
            raise ConfigError(f"weights {self.weights!r}: expected one of {', '.join(WEIGHTS)}")
        if self.trains and self.weights != "bf16":
            raise ConfigError(f"training updates its weights: --weights {self.weights} is for the others")
        if self.lora < 0 or (self.lora and not (self.trains or self.run)):
            raise ConfigError(f"lora {self.lora}: expected a rank above 0, and workload train or grpo")
        if self.workload != "train" and self.cfg.num_nextn_predict_layers:
            object.__setattr__(self, "cfg", dataclasses.replace(self.cfg, num_nextn_predict_layers=0))
        if self.strategy.num_devices != self.topology.num_devices:
            sizes = " x ".join(f"{a}={n}" for a, n in self.strategy.sizes if n > 1) or "one device"
            raise ConfigError(
                f"the mesh {sizes} is {self.strategy.num_devices} devices, but {self.topology.name} has "
                f"{self.topology.num_devices}; make the product of the axes equal to it"
            )
        self.strategy.check_fits(self.cfg)
        if self.trains:
            refuse_slots(self.strategy, "training")
        for name, size in (
            ("batch", self.batch),
            ("cache_batch", self.batch),
            ("length", self.context),
            ("cache_length", self.context),
        ):
            parts = self.strategy.parts(self.rules, name)
            if size % parts:
                what = "batch" if "batch" in name else "context"
                raise ConfigError(
                    f"{what} {size} is not divisible by the {parts} parts of {name} [{self.phase}]"
                )

    @property
    def phase(self) -> str:
        """Name of the strategy's rule table that lays this workload out."""
        return {
            "rollout": "decode", "grpo": "train", "log-probs": "train",
            "lay out": "decode", "read": "prefill", "seat": "decode",
        }.get(self.workload, self.workload)  # fmt: skip

    @property
    def trains(self) -> bool:
        """True for workloads that use the trainer's weights and rules."""
        return self.phase == "train"

    @property
    def rules(self) -> Rules:
        return getattr(self.strategy, self.phase)

    @property
    def microbatches(self) -> int:
        """Number of microbatches in a training step."""
        return self.run.batch.accumulation if self.run and self.trains else 1

    @property
    def float32_moments(self) -> bool:
        """True if the optimizer's moments are stored in float32, as those of adapters are."""
        return self.run.optimizer.moments == "float32" if self.run else bool(self.lora)

    @property
    def tokens(self) -> int:
        """Tokens processed per step."""
        return self.microbatches * self.batch * (1 if self.phase == "decode" else self.context)


def abstract_model(job: Job) -> DeepSeek:
    """Return the model's shapes and shardings, in the dtype in which its weights are stored."""
    dtype = jnp.dtype((job.run.compute_dtype if job.run else "") or "bfloat16")
    if (job.trains or job.run) and not job.lora:
        dtype = jnp.dtype("float32")
    model = job_weights(DeepSeek.abstract(job.cfg, job.strategy, dtype), job.weights)
    place_experts(model)
    return model


def job_weights(model: DeepSeek, weights: str) -> DeepSeek:
    """Give an abstract model the job's kind of weights. Only this function knows the quantised kinds."""
    if weights == "bf16":
        return model
    return quantize_abstract(model, weights)


# -------------------------------------------------------------------- on the slice's mesh


def abstract_step(job: Job, mesh: Mesh) -> tuple[Any, tuple, dict[str, int]]:
    """Return the jitted step, its abstract arguments, and their bytes per device by kind.

    The mesh must be the current one (`jax.set_mesh`).
    """

    def array(shape: Any, dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda a: array(a.shape, a.dtype, a.sharding.spec if a.sharding else P()), tree)

    def value(path: str, param: Any, sharding: NamedSharding) -> Any:
        return array(param.get_value().shape, param.get_value().dtype, sharding.spec)

    model, run = fill(abstract_model(job), mesh, value), train_run(job)
    model = lora.adapt(model, run.lora, 0) if job.lora else model
    if job.run and job.workload in ("read", "seat", "rollout"):  # these use the sampler's copy of the policy
        layout = functools.partial(in_decode, dtype=sampling_dtype(run))
        model = placed(jax.eval_shape(layout, model))
    reference = 0
    if job.workload == "log-probs":
        other = placed(jax.eval_shape(functools.partial(_reference, run), model))
        reference = device_bytes(other) if run.grpo.beta and run.reference.kind != "base" else 0
        model = model if run.grpo.old_logprobs == "trainer" else other
    given = {"weights": device_bytes(model)}
    if job.workload in ("train", "grpo"):
        step, args = _train(job, run, model, array, placed)
        given["optimizer"] = device_bytes(args[0].moments)
    elif job.workload == "log-probs":
        count = array((), jnp.int32, P())
        batch = dataclasses.replace(_batch(job, run, array), count=count)
        step, args = make_logprobs(_loss(run)), (model, batch)
        given["reference"] = reference
    elif job.workload == "prefill":
        step, args = _prefill(job, model)
    elif job.workload == "lay out":
        step, args = as_in_decode.new, (model, (sampling_dtype(run),))  # type: ignore[attr-defined]
    elif job.workload == "read":
        step, args = _read(job, run, model)
    elif job.workload == "seat":
        step, args = _seat(job, run, model, array, placed)
    else:
        step, args = _decode(job, model, array, placed)
        given["cache"] = device_bytes(args[1].caches)
    return step, args, given


def _state(job: Job, model: DeepSeek, dtype: str, array: Any, placed: Any) -> programs.State:
    """Abstract engine state between dispatches, for `batch` sequences of `context` tokens."""
    B, rules = job.batch, job.rules
    caches = placed(jax.eval_shape(lambda: model.init_caches(B, job.context, dtype, rules)))
    kinds = (jnp.int32, jnp.int32, jnp.bool)
    return programs.State(caches, *(array((B,), kind, rules.spec("batch")) for kind in kinds))


def _decode(job: Job, model: DeepSeek, array: Any, placed: Any) -> tuple[Any, tuple]:
    B, width = job.batch, TOKENS_PER_DISPATCH
    temperature, record = (1.0, ("logprobs",)) if job.workload == "rollout" else (0.0, ())
    sampling, dtype = Sampling(temperature=temperature, top_p=1.0), "bfloat16"
    if job.run:
        sampling, dtype = _sampling(job.run), sampling_dtype(job.run)
        record += ("experts",) if _records_experts(job.run) else ()
    state = _state(job, model, dtype, array, placed)
    params, done_B, stops_BK = SamplingArrays.of([sampling] * B), np.zeros(B, bool), np.full((B, 1), -1)
    form: Any = tpu if jax.sharding.get_mesh().devices.flat[0].platform == "tpu" else plain
    weights = placed(jax.eval_shape(form.prepare, model))
    step = programs.laid_out_steps(weights, state, width=width, mode=sampling.mode, record=record, form=form)
    return step, (weights, state, done_B, params, stops_BK.astype(np.int32), np.int32(width), np.int32(B))


def _prefill(job: Job, model: DeepSeek) -> tuple[Any, tuple]:
    return programs.read_chunk, (model, *_chunk(job), None, job.context, "bfloat16", False)


def _chunk(job: Job) -> tuple[Any, ...]:
    """Tokens, the position of the first, and lengths, of `batch` prompts that are read in one chunk."""
    tokens_PT, lengths_P = np.zeros((job.batch, job.context), np.int32), np.full(job.batch, job.context)
    return tokens_PT, np.int32(0), lengths_P.astype(np.int32)


def train_run(job: Job) -> RunConfig:
    """Return the run that a training job is one step of.

    A job without a run gets DeepSeek-V3's pretraining as the defaults of config/run.py have it, or GRPO as
    for R1-Zero with prompts and answers sharing the context evenly.
    """
    if job.run is not None:
        return job.run
    raw: dict[str, Any] = {
        "objective": "pretrain", "model": job.cfg.model_type, "out": "-", "steps": 1,
        "compute_dtype": "bfloat16", "batch": {"size": job.batch},
        "data": {"train": ["-"], "length": max(job.context, 2)}, "loss": {"sequence_balance": 1e-4},
        "remat": job.remat,
    }  # fmt: skip
    if job.workload == "grpo":
        group = math.gcd(job.batch, 16)
        half, size = max(job.context // 2, 1), {"prompts": job.batch // group, "slots": job.batch}
        raw |= {"objective": "grpo", "loss": {}, "rewards": [{"kind": "exact"}], "batch": {}}
        raw |= {"rollout": size | {"max_prompt_tokens": half, "max_new_tokens": half}}
        raw |= {"grpo": {"group_size": group} if group > 1 else {"group_size": 1, "baseline": "none"}}
        raw |= {"reference": {"kind": "base" if job.lora else "device"}}
    raw |= {"lora": {"rank": job.lora}} if job.lora else {"optimizer": {"moments": "bfloat16"}}
    return RunConfig.from_dict(raw)


def _train(job: Job, run: RunConfig, model: DeepSeek, array: Any, placed: Any) -> tuple[Any, tuple]:
    optimizer = make_optimizer(run.program, decays(model))
    moments = placed(jax.eval_shape(optimizer.init, trained(model)))
    state = State(model, moments, array((), jnp.int32, P()))
    weight = np.float32(0.3 if job.cfg.num_nextn_predict_layers else 0)
    step = make_step(_loss(run), optimizer, "tpu")
    return step, (state, _batch(job, run, array), StepInputs(weight, np.float32(0.001)))


def _loss(run: RunConfig) -> Loss:
    dtype = jnp.dtype(run.compute_dtype or "bfloat16")
    if run.objective == "grpo":
        return PolicyLoss(run.program, dtype, MOST_IN_A_ROW)
    return LanguageLoss(run.program, dtype)


def _batch(job: Job, run: RunConfig, array: Any) -> Batch:
    """Abstract batch on the mesh with all microbatches of a step."""
    rows = np.zeros((job.microbatches * job.batch, 2), np.int8)  # any length: only the fields are used
    fields = make_batch(rows, rows, rows, job.cfg.num_nextn_predict_layers, job.microbatches)
    if run.objective == "grpo":  # sampling log-probs, and the others that the run needs
        known = {"mask", "advantage", "sampled"} | ({"reference"} if run.grpo.beta else set())
        known |= {"drawn"} if run.grpo.importance_cap else set()
        known |= {"old"} if run.grpo.old_logprobs == "trainer" else set()
        more = dict.fromkeys((f"{name}_BT" for name in known), fields.segments_BT.astype(np.float32))
        fields = dataclasses.replace(fields, prefixes_BT=fields.segments_BT)
        fields = PolicyBatch(**vars(fields), **more)

    def batch(a: np.ndarray) -> jax.ShapeDtypeStruct:
        names = ("batch", *(None,) * (a.ndim - 3), "length")[: a.ndim - 1]
        return array((*a.shape[:-1], job.context), a.dtype, P(None, *job.rules.spec(*names)))

    placed = jax.tree.map(batch, fields)
    if run.objective == "grpo" and _records_experts(run):
        sparse = sum(map(job.cfg.is_moe_layer, range(job.cfg.num_hidden_layers)))
        shape = (*placed.tokens_BT.shape, sparse, job.cfg.num_experts_per_tok)
        spec = P(None, *job.rules.spec("batch", "length", None, None))
        placed = dataclasses.replace(placed, experts_BTLK=array(shape, jnp.int32, spec))
    return placed


# -------------------------------------------------------------------- the other programs of a GRPO step


def sampling_dtype(run: RunConfig) -> str:
    """Dtype of a rollout's weights and caches."""
    return run.rollout.dtype or run.compute_dtype or "bfloat16"


@dataclass(frozen=True)
class RolloutShapes:
    """Arrays of a rollout: a chunk of `length` tokens of `prompts` is read at a time, into caches of
    `prompt_capacity`, and `slots` sequences decode, with caches of `capacity`."""

    prompts: int
    length: int
    prompt_capacity: int
    slots: int
    capacity: int


def room(run: RunConfig, strategy: Strategy) -> RolloutShapes:
    """Shapes of a rollout whose prompts are all as long as they may be."""
    rollout, mesh, decoding = run.rollout, Room.of(strategy), at_a_time(run)
    plan = chunks(max(1, rollout.max_prompt_tokens - 1), mesh.columns)
    need = rollout.max_prompt_tokens + rollout.max_new_tokens
    return RolloutShapes(
        prompts=mesh.rows * lanes(-(-rollout.prompts // mesh.rows), plan),
        length=plan[0],
        prompt_capacity=slots.bucket(sum(plan), sum(plan), mesh.length, slots.PROMPTS),
        slots=decoding + -decoding % mesh.slots,
        capacity=need + -need % mesh.length,
    )


def _sampling(run: RunConfig) -> Sampling:
    rollout = run.rollout
    return Sampling(1, rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p)


def _records_experts(run: RunConfig) -> bool:
    return run.grpo.routing_replay or run.rollout.record_experts


def _reference(run: RunConfig, model: DeepSeek) -> DeepSeek:
    """Return the policy that KL is measured against, laid out as ReferencePolicy does."""
    if run.reference.kind == "base":
        return lora.base(model)
    return cast(lora.merged(model) if is_adapted(model) else model, run.compute_dtype or "bfloat16")


def _read(job: Job, run: RunConfig, model: DeepSeek) -> tuple[Any, tuple]:
    how = (room(run, job.strategy).prompt_capacity, sampling_dtype(run), _records_experts(run))
    return programs.read_chunk, (model, *_chunk(job), None, *how)


def _seat(job: Job, run: RunConfig, model: DeepSeek, array: Any, placed: Any) -> tuple[Any, tuple]:
    found, rules, dtype = room(run, job.strategy), job.rules, sampling_dtype(run)
    split = job.strategy.parts(rules, "cache_length") > 1
    size = (found.prompts, found.capacity if split else found.prompt_capacity)
    read = placed(jax.eval_shape(lambda: model.init_caches(*size, dtype, rules)))
    caches = _state(job, model, dtype, array, placed).caches
    return slots.seated, (caches, read, np.zeros(job.batch, np.int32), rules)
