"""What the lab compiles: a step of ours for a slice, and the shapes that it is called with.

The step is the one that runs: the engine's prefill and decode, the trainer's optimizer step. Nothing of it is
modelled here, and nothing is allocated.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxseek.config import ConfigError, ModelConfig
from jaxseek.generate import engine
from jaxseek.generate.sampling import Sampling, SamplingArrays
from jaxseek.lab.chips import Topology
from jaxseek.layers.quant import quantize_abstract
from jaxseek.model import DeepSeek
from jaxseek.redundancy import place_experts, refuse_slots
from jaxseek.rl.experience import MOST_IN_A_ROW, PolicyBatch
from jaxseek.rl.objective import PolicyObjective
from jaxseek.run_config import RunConfig
from jaxseek.sharding import Rules, Strategy, device_bytes, fill
from jaxseek.train.batch import make_batch
from jaxseek.train.lora import adapt
from jaxseek.train.objectives import Objective
from jaxseek.train.optimizer import decays, make_optimizer
from jaxseek.train.step import State, make_step, trained

WORKLOADS = ("decode", "prefill", "train", "rollout", "grpo")
WEIGHTS = ("bf16", "int8", "int4", "fp8")
TOKENS_PER_DISPATCH = 32  # the engine's default


@dataclass(frozen=True)
class Job:
    """One thing to compile: `batch` sequences of `context` tokens, in the cache (decode, rollout) or read.

    Training rests in float32 (its moments in bfloat16) and computes in bfloat16, as the trainer does with
    DeepSeek-V3's run file; `grpo` is the update on sampled answers, a row of `context` tokens each. With
    `lora` only adapters of that rank are trained, on bfloat16 weights. All workloads but `train` leave the
    multi-token module out, as `convert --no-mtp` does.
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

    def __post_init__(self) -> None:
        if self.workload not in WORKLOADS:
            raise ConfigError(f"workload {self.workload!r}: expected one of {', '.join(WORKLOADS)}")
        if self.weights not in WEIGHTS:
            raise ConfigError(f"weights {self.weights!r}: expected one of {', '.join(WEIGHTS)}")
        if self.trains and self.weights != "bf16":
            raise ConfigError(f"training updates its weights: --weights {self.weights} is for the others")
        if self.lora < 0 or (self.lora and not self.trains):
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
        """The table of the strategy that lays this workload out."""
        return {"rollout": "decode", "grpo": "train"}.get(self.workload, self.workload)

    @property
    def trains(self) -> bool:
        """Whether a step changes weights."""
        return self.phase == "train"

    @property
    def rules(self) -> Rules:
        return getattr(self.strategy, self.phase)

    @property
    def tokens(self) -> int:
        """That a step makes or reads."""
        return self.batch * (1 if self.phase == "decode" else self.context)


def abstract_model(job: Job) -> DeepSeek:
    """The model's shapes and shardings, in the dtype that its weights rest in."""
    dtype = jnp.float32 if job.trains and not job.lora else jnp.bfloat16
    model = job_weights(DeepSeek.abstract(job.cfg, job.strategy, dtype), job.weights)
    place_experts(model)
    return model


def job_weights(model: DeepSeek, weights: str) -> DeepSeek:
    """An abstract model with its weights as the job has them: the one place that knows of quantised ones."""
    if weights == "bf16":
        return model
    return quantize_abstract(model, {"fp8": "float8"}.get(weights, weights))


# -------------------------------------------------------------------- on the slice's mesh


def abstract_step(job: Job, mesh: Mesh) -> tuple[Any, tuple, dict[str, int]]:
    """The jitted step, the abstract arguments it is called with, and their bytes per device by kind. The
    mesh must be set."""

    def array(shape: Any, dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda a: array(a.shape, a.dtype, a.sharding.spec if a.sharding else P()), tree)

    def value(path: str, param: Any, sharding: NamedSharding) -> Any:
        return array(param.get_value().shape, param.get_value().dtype, sharding.spec)

    model = fill(abstract_model(job), mesh, value)
    model = adapt(model, train_run(job).lora, 0) if job.lora else model
    given = {"weights": device_bytes(model)}
    if job.trains:
        step, args = _train(job, model, array, placed)
        given["optimizer"] = device_bytes(args[0].moments)
    elif job.workload == "prefill":
        step, args = _prefill(job, model)
    else:
        step, args = _decode(job, model, array, placed)
        given["cache"] = device_bytes(args[1].caches)
    return step, args, given


def _decode(job: Job, model: DeepSeek, array: Any, placed: Any) -> tuple[Any, tuple]:
    B, rules, width = job.batch, job.rules, TOKENS_PER_DISPATCH
    caches = placed(jax.eval_shape(lambda: model.init_caches(B, job.context, "bfloat16", rules)))
    kinds = (jnp.int32, jnp.int32, jnp.bool)
    state = engine.State(caches, *(array((B,), kind, rules.spec("batch")) for kind in kinds))
    temperature, record = (1.0, ("logprobs",)) if job.workload == "rollout" else (0.0, ())
    sampling = Sampling(temperature=temperature, top_p=1.0)
    params, done_B, stops_BK = SamplingArrays.of([sampling] * B), np.zeros(B, bool), np.full((B, 1), -1)
    step = engine.laid_out_steps(model, state, width=width, mode=sampling.mode, record=record)
    return step, (model, state, done_B, params, stops_BK.astype(np.int32), np.int32(width), np.int32(B))


def _prefill(job: Job, model: DeepSeek) -> tuple[Any, tuple]:
    tokens_BT, lengths_B = np.zeros((job.batch, job.context), np.int32), np.ones(job.batch, np.int32)
    sampling = Sampling(temperature=0.0)
    params = SamplingArrays.of([sampling] * job.batch)
    return engine._prefill, (model, tokens_BT, lengths_B, params, job.context, "bfloat16", sampling.mode)


def train_run(job: Job) -> RunConfig:
    """The run that a training job is a step of: DeepSeek-V3's pretraining as run_config.py has it, or GRPO as
    R1-Zero's."""
    raw: dict[str, Any] = {
        "objective": "pretrain", "model": job.cfg.model_type, "out": "-", "steps": 1,
        "compute_dtype": "bfloat16", "batch": {"size": job.batch},
        "data": {"train": ["-"], "length": job.context}, "loss": {"sequence_balance": 1e-4},
        "remat": job.remat,
    }  # fmt: skip
    if job.workload == "grpo":
        raw |= {"objective": "grpo", "loss": {}, "rewards": [{"kind": "exact"}]}
    raw |= {"lora": {"rank": job.lora}} if job.lora else {"optimizer": {"moments": "bfloat16"}}
    return RunConfig.from_dict(raw)


def _train(job: Job, model: DeepSeek, array: Any, placed: Any) -> tuple[Any, tuple]:
    run, rules = train_run(job), job.rules
    optimizer = make_optimizer(run.recipe, decays(model))
    moments = placed(jax.eval_shape(optimizer.init, trained(model)))
    state = State(model, moments, array((), jnp.int32, P()))
    rows = np.zeros((job.batch, 2), np.int8)  # of any length: only the fields are wanted
    fields = make_batch(rows, rows, rows, job.cfg.num_nextn_predict_layers)
    objective = Objective(run.recipe, jnp.dtype(run.compute_dtype))
    if job.workload == "grpo":  # with the log-probabilities that a rollout records, and a reference
        known = ("mask_BT", "advantage_BT", "sampled_BT", "reference_BT")
        fields = dataclasses.replace(fields, prefixes_BT=fields.segments_BT)
        fields = PolicyBatch(**vars(fields), **dict.fromkeys(known, rows[None].astype(np.float32)))
        objective = PolicyObjective(run.recipe, objective.dtype, MOST_IN_A_ROW)

    def batch(a: np.ndarray) -> jax.ShapeDtypeStruct:
        names = ("batch", *(None,) * (a.ndim - 3), "length")[: a.ndim - 1]
        return array((*a.shape[:-1], job.context), a.dtype, P(None, *rules.spec(*names)))

    weight = np.float32(0.3 if job.cfg.num_nextn_predict_layers else 0)
    step = make_step(objective, optimizer, "tpu")
    return step, (state, None, jax.tree.map(batch, fields), weight, np.float32(0.001))
