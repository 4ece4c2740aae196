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
from jaxseek.run_config import RunConfig
from jaxseek.sharding import Rules, Strategy, device_bytes, fill
from jaxseek.train.batch import make_batch
from jaxseek.train.objectives import Objective
from jaxseek.train.optimizer import decays, make_optimizer
from jaxseek.train.step import State, make_step, trained

WORKLOADS = ("decode", "prefill", "train", "rollout")
WEIGHTS = ("bf16", "int8", "int4", "fp8")
TOKENS_PER_DISPATCH = 32  # the engine's default


@dataclass(frozen=True)
class Job:
    """One thing to compile: `batch` sequences of `context` tokens, in the cache (decode, rollout) or read.

    Training rests in float32 (its moments in bfloat16) and computes in bfloat16, as the trainer does with
    DeepSeek-V3's run file; the other workloads leave the multi-token module out, as `convert --no-mtp` does.
    """

    cfg: ModelConfig
    strategy: Strategy
    topology: Topology
    workload: str
    batch: int
    context: int
    weights: str = "bf16"
    remat: str = "full"

    def __post_init__(self) -> None:
        if self.workload not in WORKLOADS:
            raise ConfigError(f"workload {self.workload!r}: expected one of {', '.join(WORKLOADS)}")
        if self.weights not in WEIGHTS:
            raise ConfigError(f"weights {self.weights!r}: expected one of {', '.join(WEIGHTS)}")
        if self.workload == "train" and self.weights != "bf16":
            raise ConfigError(f"training updates its weights: --weights {self.weights} is for the others")
        if self.workload != "train" and self.cfg.num_nextn_predict_layers:
            object.__setattr__(self, "cfg", dataclasses.replace(self.cfg, num_nextn_predict_layers=0))
        if self.strategy.num_devices != self.topology.num_devices:
            sizes = " x ".join(f"{a}={n}" for a, n in self.strategy.sizes if n > 1) or "one device"
            raise ConfigError(
                f"the mesh {sizes} is {self.strategy.num_devices} devices, but {self.topology.name} has "
                f"{self.topology.num_devices}; make the product of the axes equal to it"
            )
        self.strategy.check_fits(self.cfg)
        for name, size in (("batch", self.batch), ("length", self.context), ("cache_length", self.context)):
            parts = self.strategy.parts(self.rules, name)
            if size % parts:
                what = "batch" if name == "batch" else "context"
                raise ConfigError(
                    f"{what} {size} is not divisible by the {parts} parts of {name} [{self.phase}]"
                )

    @property
    def phase(self) -> str:
        """The table of the strategy that lays this workload out."""
        return "decode" if self.workload == "rollout" else self.workload

    @property
    def rules(self) -> Rules:
        return getattr(self.strategy, self.phase)

    @property
    def tokens(self) -> int:
        """That a step makes or reads."""
        return self.batch * (1 if self.phase == "decode" else self.context)


def abstract_model(job: Job) -> DeepSeek:
    """The model's shapes and shardings, in the dtype that its weights rest in."""
    dtype = jnp.float32 if job.workload == "train" else jnp.bfloat16
    return job_weights(DeepSeek.abstract(job.cfg, job.strategy, dtype), job.weights)


def job_weights(model: DeepSeek, weights: str) -> DeepSeek:
    """An abstract model with its weights as the job has them: the one place that knows of quantised ones."""
    if weights == "bf16":
        return model
    return quantize_abstract(model, {"fp8": "float8"}.get(weights, weights))


# -------------------------------------------------------------------- on the slice's mesh


def lower(job: Job, mesh: Mesh) -> tuple[Any, dict[str, int]]:
    """The lowered step, and the bytes per device of what it is given, by kind. The mesh must be set."""

    def array(shape: Any, dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda a: array(a.shape, a.dtype, a.sharding.spec if a.sharding else P()), tree)

    def value(path: str, param: Any, sharding: NamedSharding) -> Any:
        return array(param.get_value().shape, param.get_value().dtype, sharding.spec)

    model = fill(abstract_model(job), mesh, value)
    given = {"weights": device_bytes(model)}
    if job.workload == "train":
        step, args = _train(job, model, array, placed)
        given["optimizer"] = device_bytes(args[0].moments)
    elif job.workload == "prefill":
        step, args = _prefill(job, model)
    else:
        step, args = _decode(job, model, array, placed)
        given["cache"] = device_bytes(args[1].caches)
    return step.lower(*args), given


def _decode(job: Job, model: DeepSeek, array: Any, placed: Any) -> tuple[Any, tuple]:
    B, rules = job.batch, job.rules
    caches = placed(jax.eval_shape(lambda: model.init_caches(B, job.context, "bfloat16", rules)))
    kinds = (jnp.int32, jnp.int32, jnp.bool)
    state = engine.State(caches, *(array((B,), kind, rules.spec("batch")) for kind in kinds))
    temperature, record = (1.0, ("logprobs",)) if job.workload == "rollout" else (0.0, ())
    sampling = Sampling(temperature=temperature, top_p=1.0)
    params, width = SamplingArrays.of([sampling] * B), TOKENS_PER_DISPATCH
    done_B, stops_BK = np.zeros(B, bool), np.full((B, 1), -1, np.int32)
    return engine.decode_steps, (
        model, state, done_B, params, stops_BK, width, B, width, sampling.mode, record,
    )  # fmt: skip


def _prefill(job: Job, model: DeepSeek) -> tuple[Any, tuple]:
    tokens_BT, lengths_B = np.zeros((job.batch, job.context), np.int32), np.ones(job.batch, np.int32)
    sampling = Sampling(temperature=0.0)
    params = SamplingArrays.of([sampling] * job.batch)
    return engine._prefill, (model, tokens_BT, lengths_B, params, job.context, "bfloat16", sampling.mode)


def train_run(job: Job) -> RunConfig:
    """The run that a training job is a step of: DeepSeek-V3's pretraining as run_config.py has it."""
    return RunConfig.from_dict(
        {
            "objective": "pretrain", "model": job.cfg.model_type, "out": "-", "steps": 1,
            "remat": job.remat, "compute_dtype": "bfloat16", "batch": {"size": job.batch},
            "data": {"train": ["-"], "length": job.context},
            "optimizer": {"moments": "bfloat16"}, "loss": {"sequence_balance": 1e-4},
        }
    )  # fmt: skip


def _train(job: Job, model: DeepSeek, array: Any, placed: Any) -> tuple[Any, tuple]:
    run, rules = train_run(job), job.rules
    optimizer = make_optimizer(run, decays(model))
    moments = placed(jax.eval_shape(optimizer.init, trained(model)))
    state = State(model, moments, array((), jnp.int32, P()))
    rows = np.zeros((job.batch, 2), np.int8)  # of any length: only the fields are wanted
    fields = make_batch(rows, rows, rows, job.cfg.num_nextn_predict_layers)

    def batch(a: np.ndarray) -> jax.ShapeDtypeStruct:
        names = ("batch", *(None,) * (a.ndim - 3), "length")[: a.ndim - 1]
        return array((*a.shape[:-1], job.context), a.dtype, P(None, *rules.spec(*names)))

    weight = np.float32(0.3 if job.cfg.num_nextn_predict_layers else 0)
    step = make_step(Objective(run, jnp.dtype(run.compute_dtype)), optimizer)
    return step, (state, None, jax.tree.map(batch, fields), weight, np.float32(0.001))
