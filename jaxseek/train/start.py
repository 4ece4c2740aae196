"""The start of a run: its directory, tokenizer, mesh and model, or the checkpoint that it continues from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxseek.api import load
from jaxseek.checkpoint import models
from jaxseek.checkpoint.digests import Digests
from jaxseek.checkpoint.directory import LOCK
from jaxseek.config.model import ConfigError, ModelConfig, presets
from jaxseek.config.run import Program, RunConfig
from jaxseek.data.dataset import train_tokenizer
from jaxseek.data.sources import function
from jaxseek.experts.replicate import refuse_slots
from jaxseek.machine import hosts
from jaxseek.machine.host_memory import free_memory
from jaxseek.model.deepseek import DeepSeek
from jaxseek.sharding.parameters import fill, parameters
from jaxseek.sharding.strategy import Strategy
from jaxseek.storage.hub import model_place
from jaxseek.storage.place import Place, file_sizes, place, scratch, writable
from jaxseek.storage.untrusted import expect, read_json
from jaxseek.tokenizer.tokenizer import Tokenizer
from jaxseek.train import lora
from jaxseek.train.checkpoints import Checkpoints, UnreadableError
from jaxseek.train.optimizer import decays, make_optimizer
from jaxseek.train.step import State, init_state

# Keys that may differ when a run continues: they say where it runs and what it writes, not what it computes.
FREE = (
    "out",
    "mesh",
    "steps",
    "remat",
    "batch.accumulation",
    "eval.",
    "checkpoint.",
    "log.",
    "rollout.reward_workers",
)


@dataclass(frozen=True)
class Setup:
    """A run with what is known of it before its weights are read."""

    run: RunConfig
    cfg: ModelConfig
    strategy: Strategy
    tokenizer: Tokenizer


def compute_dtype(run: RunConfig) -> Any:
    """Dtype of activations and matmuls."""
    on_cpu = jax.default_backend() == "cpu"
    return jnp.dtype(run.compute_dtype or ("float32" if on_cpu else "bfloat16"))


def claim(run: RunConfig) -> None:
    """Make the run's directory, or check that the run in it is this one. Raises ConfigError.

    A directory that has nothing but a run's settings, because they were wrong, is free for other runs.
    """
    hosts.from_first(lambda: _claim(run))
    hosts.check_shared(place(run.out))


def _claim(run: RunConfig) -> None:
    out = writable(run.out)
    kept = out / "run.json"
    made = [name for name in file_sizes(out) if not name.startswith(("run.json", hosts.TOKEN, LOCK))]
    now, before = run.to_dict(), _read_settings(kept) if kept.is_file() else None
    if before is not None and made:
        was, is_ = _flat(_with_defaults(before)), _flat(now)
        differ = [
            f"{key} (was {was.get(key)!r}, is {is_.get(key)!r})"
            for key in sorted(was.keys() | is_.keys())
            if was.get(key) != is_.get(key) and not key.startswith(FREE)
        ]
        if differ:
            raise ConfigError(
                f"{out} holds a run with other settings: {', '.join(differ)}. "
                "Choose another out, or set them back to go on with that run"
            )
    elif made or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} is not empty and holds no run; choose another out")
    if now != before:
        models.write_json(kept, now)  # at once: a run that is killed here starts again


def _with_defaults(before: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, with those that did not exist yet when it began; they are its defaults."""
    try:
        return RunConfig.from_dict(before).to_dict()
    except ConfigError:  # a key has gone since
        return before


def _read_settings(kept: Place) -> dict[str, Any]:
    try:
        return read_json(kept)
    except ValueError as e:
        raise ConfigError(
            f"{kept}: is damaged ({str(e)[:200]}), expected the settings of the run in "
            "that directory; put back a copy of it, or choose another out"
        ) from None


def finished(run: RunConfig) -> int | None:
    """Number of steps of a run that is over, also of one that ended early; None for one that can continue."""
    path = place(run.out) / "model"

    def steps() -> int | None:
        if models.kind_of(path) is None:
            return None
        form = {"steps": int, "run": {"steps": int}}
        origin = models.read_manifest(path)["origin"]
        expect(origin, form, f"{path / models.MANIFEST}: origin", ConfigError)
        return origin["steps"] if origin["run"]["steps"] == run.steps else None

    return hosts.from_first(steps)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def open_tokenizer(run: RunConfig, cfg: ModelConfig) -> Tokenizer:
    """Open the run's tokenizer: its own, a newly trained one (kept in the run's directory), or the model's.

    Raises ConfigError if there is none, and TokenizerError for one with more tokens than the model.
    """
    source, made = run.tokenizer or run.model, run.tokenizer.startswith(("train:", "python:"))
    kind, _, size = run.tokenizer.partition(":")
    if kind == "train" and size.isdecimal() and int(size) > cfg.vocab_size:
        raise ConfigError(
            f"tokenizer = {run.tokenizer!r} is larger than the model's vocabulary of {cfg.vocab_size}; ask "
            f"for train:{cfg.vocab_size} at most, or raise [config] vocab_size"
        )
    if made:
        hosts.from_first(lambda: _make_tokenizer(run))
    at = place(run.out) / "tokenizer" if made else model_place(source, weights=False)
    if models.kind_of(at) == "jaxseek":
        Digests.noted(at).check_small()
    tokenizer = Tokenizer.from_dir(at) if at.is_dir() else None
    if tokenizer is None and made:
        raise ConfigError(f"{source} has made no tokenizer; expected tokenizer.json or a .model file")
    if tokenizer is None:
        raise ConfigError(
            f"{source} has no tokenizer; name a directory that has one (tokenizer = DIR), "
            'or train one on the data (tokenizer = "train:2048")'
        )
    tokenizer.check_fits(cfg.vocab_size)
    return tokenizer


def _make_tokenizer(run: RunConfig) -> None:
    made = place(run.out) / "tokenizer"
    if Tokenizer.from_dir(made) is not None:
        return
    with scratch("tokenizer") as folder:
        if run.tokenizer.startswith("python:"):
            function(run.tokenizer)(folder)
        else:
            train_tokenizer(run, folder)
        if new := Tokenizer.from_dir(folder):
            new.save(made)


def model_config(run: RunConfig) -> ModelConfig:
    """Read the config of the run's model, with its `[config]` fields changed.

    The name of a released model stands for random weights in pretraining alone. Raises ConfigError for a
    quantised model, CheckpointError for one that does not exist.
    """
    kind = models.kind_of(run.model)
    random = run.model.startswith("tiny-") or run.objective == "pretrain"
    if kind is None and not (random and run.model in presets()):
        raise models.not_a_checkpoint(run.model)
    if kind == "jaxseek" and models.stored_quantization(models.read_manifest(place(run.model))):
        raise ConfigError(
            f"{run.model} is quantised, so it cannot be trained; convert it first: "
            f"jaxseek convert {run.model} DST --dtype bfloat16"
        )
    at = model_place(run.model, weights=False)
    if kind == "jaxseek":
        Digests.noted(at).check_small()
    return with_changes(run, ModelConfig.from_hf(at) if kind else ModelConfig.from_preset(run.model))


def with_changes(run: RunConfig, cfg: ModelConfig) -> ModelConfig:
    """Apply the run's `[config]` fields to a config. Raises ConfigError for fields that it does not have."""
    if not run.config:
        return cfg
    fields = cfg.to_hf()
    if unknown := [key for key in run.config if key not in fields]:
        raise ConfigError(f"config has {', '.join(unknown)}, which {cfg.model_type} models have not")
    return ModelConfig.from_hf(fields | run.config).replace(generation=cfg.generation)


def open_strategy(run: RunConfig, cfg: ModelConfig) -> Strategy:
    """Parse the run's mesh, by default all devices on axis fsdp. Raises ConfigError if it does not fit."""
    several = jax.process_count() > 1
    one = jax.default_backend() == "cpu" and not several
    strategy = Strategy.parse(run.mesh or {"fsdp": 1 if one else jax.device_count()})
    check_strategy(run, cfg, strategy)
    if several:
        strategy.make_mesh()  # an error now, before the run has a directory
    return strategy


def check_strategy(run: RunConfig, cfg: ModelConfig, strategy: Strategy) -> None:
    """Raise ConfigError if the mesh does not fit the model, or the run's rows do not fit either of them."""
    strategy.check_fits(cfg)
    refuse_slots(strategy, "training")
    rows, microbatches = strategy.parts(strategy.train, "batch"), run.batch.accumulation
    if run.objective in ("grpo", "reject"):  # their rows are packed to fit the mesh
        rollout = run.rollout
        if rollout.max_prompt_tokens + rollout.max_new_tokens > cfg.max_position_embeddings:
            raise ConfigError(
                f"rollout.max_prompt_tokens {rollout.max_prompt_tokens} + max_new_tokens "
                f"{rollout.max_new_tokens} are more than the model's context of "
                f"{cfg.max_position_embeddings}; lower one"
            )
        return
    if run.batch.size % (rows * microbatches):
        raise ConfigError(
            f"batch.size {run.batch.size} is not divisible by the mesh's {rows} parts of the batch x "
            f"{microbatches} microbatches (batch.accumulation)"
        )
    length, columns = run.data.length, strategy.parts(strategy.train, "length")
    if length % columns:
        raise ConfigError(
            f"data.length {length} is not divisible by the mesh's {columns} parts of the length"
        )
    if length > cfg.max_position_embeddings:
        raise ConfigError(
            f"data.length {length} is more than the model's context of {cfg.max_position_embeddings}; "
            "extend it ([config] max_position_embeddings and rope_scaling), or shorten the rows"
        )
    groups = run.loss.device_groups
    if (run.loss.device_balance or run.loss.communication_balance) and cfg.n_routed_experts % groups:
        raise ConfigError(f"loss.device_groups {groups} does not divide the {cfg.n_routed_experts} experts")


def open_model(run: RunConfig, cfg: ModelConfig, strategy: Strategy) -> DeepSeek:
    """Open the model that the run starts from, in float32; the base of adapters is in the compute dtype."""
    dtype = compute_dtype(run) if run.lora.rank else jnp.float32
    if models.kind_of(run.model) is None:
        needed, free = cfg.num_params(mtp=True) * jnp.dtype(dtype).itemsize, free_memory()
        if jax.default_backend() == "cpu" and needed > free:
            raise ConfigError(
                f"the weights of {run.model} as configured are {needed / 1e9:,.1f} GB, of which "
                f"{free / 1e9:,.1f} GB of memory are free; choose a smaller model"
            )
        return DeepSeek.init(cfg, strategy, run.seed, dtype)
    model, _ = load(run.model, strategy, dtype)
    if model.cfg == cfg:
        return model
    other = DeepSeek.abstract(cfg, strategy, dtype)
    values = {p: v.get_value() for p, v in parameters(model).items()}
    shapes = {p: v.get_value().shape for p, v in parameters(other).items()}
    models.raise_mismatch(
        f"[config] makes another model of {run.model}",
        {p: v.shape for p, v in values.items()},
        shapes,
        "change only fields that leave the weights as they are, such as rope_scaling",
    )
    return fill(other, model.mesh, lambda p, *_: values[p])


def first_state(
    setup: Setup, program: Program, checkpoints: Checkpoints
) -> tuple[State, optax.GradientTransformation, int, Any]:
    """Make the state that a run begins with, or restore the newest whole checkpoint.

    Returns the state, its optimizer, the number of steps done, and the position that was saved with it (None
    at the beginning).
    """
    run, cfg, strategy = setup.run, setup.cfg, setup.strategy
    step = checkpoints.newest_whole()
    if step is None or run.lora.rank:  # a checkpoint of adapters holds no base
        model = open_model(run, cfg, strategy)
        model = lora.adapt(model, run.lora, run.seed) if run.lora.rank else model
        optimizer = make_optimizer(program, decays(model))
        state = init_state(model, optimizer)
    else:
        model = DeepSeek.abstract(cfg, strategy, jnp.float32)
        optimizer = make_optimizer(program, decays(model))
        with jax.sharding.use_abstract_mesh(strategy.abstract_mesh()):
            state = jax.eval_shape(lambda m: init_state(m, optimizer), model)
    while step is not None:
        try:
            state, position = checkpoints.restore(step, state)
            return state, optimizer, step, position
        except UnreadableError as e:
            step = checkpoints.before(step, e)
    return state, optimizer, 0, None
