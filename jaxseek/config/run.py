"""RunConfig: a training run, read from a TOML file with `--set key=value` overrides.

Every key has its type and default here and nowhere else; an unknown key is an error that names the nearest
one. Uses the standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import math
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jaxseek.config.model import ConfigError, configs_dir, presets
from jaxseek.config.rl import (
    PRESETS,
    GrpoConfig,
    ReferenceConfig,
    RejectConfig,
    RewardConfig,
    RolloutConfig,
    TaskConfig,
    rl_problems,
)
from jaxseek.storage import untrusted
from jaxseek.storage.place import Place, place
from jaxseek.storage.untrusted import brief

_MOST_NUMBER = (1 << 31) - 1  # int32 on the devices
_MOST_TABLES = 8  # of a key, one within the other
# Counts that are gone through or allocated in one piece: at most these.
_MOST = {
    **dict.fromkeys(("batch.size", "batch.accumulation", "eval.rows"), 1 << 20),
    **dict.fromkeys(("distill.per_prompt", "loss.device_groups", "lora.rank"), 1 << 16),
    "data.length": 1 << 24,
}

# A constant, or a step function [[fraction of the run, value from there on], ...].
Steps = float | list


@dataclass(frozen=True)
class Columns:
    """`[data.columns]`: the name of each of our columns in the files."""

    text: str = "text"
    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    chosen: str = "chosen"
    rejected: str = "rejected"
    answer: str = "answer"
    role: str = "role"  # within a message
    content: str = "content"


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: sources of examples, and their packing into rows of `length` tokens.

    A source is a file (.jsonl, .json, .parquet; any other is a text document), a directory or glob of files,
    `hf://datasets/OWNER/NAME/FILE`, or `python:MODULE:FUNCTION?key=value`, a function that returns dicts.
    """

    train: list[str] = field(default_factory=list)
    eval: list[str] = field(default_factory=list)
    holdout: float = 0.0  # fraction of train held out for evaluation if eval is empty
    columns: Columns = field(default_factory=Columns)
    roles: dict[str, str] = field(default_factory=dict)  # role in the files -> user, assistant, ...
    length: int = 1024
    packing: bool = True  # several examples per row, separated by segment ids
    too_long: Literal["drop", "cut", "error"] = "drop"  # examples longer than `length`; always counted
    fim_rate: float = 0.0  # fraction of documents in prefix-suffix-middle form (V3 paper, section 4.1)
    shuffle: bool = True


@dataclass(frozen=True)
class BatchConfig:
    """`[batch]`: rows per step over all hosts, in `accumulation` microbatches."""

    size: int = 8
    accumulation: int = 1
    ramp_from: int = 0  # rows at the first step; 0: no ramp (DeepSeek-V3 paper, section 4.2)
    ramp_until: float = 0.0  # fraction of the run at which `size` is reached


@dataclass(frozen=True)
class OptimizerConfig:
    """`[optimizer]`: AdamW, with weight decay on matrices only, not on norms and biases."""

    learning_rate: float = 3e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # global gradient norm; 0: no clipping
    moments: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class ScheduleConfig:
    """`[schedule]`: a factor on the learning rate, after a linear warm-up.

    `cosine` and `linear` decay from 1 to `final`. `multi_step` is 1, then `factors[i]` from the fraction
    `milestones[i]` of the run (DeepSeek LLM, MoE, V2). `v3` is 1 until milestones[0], a cosine to `final`
    until milestones[1], constant until milestones[2], then `last` (DeepSeek-V3 paper, section 4.2).
    """

    kind: Literal["constant", "linear", "cosine", "multi_step", "v3"] = "cosine"
    warmup: int = 0
    final: float = 0.1
    milestones: list[float] = field(default_factory=lambda: [0.8, 0.9])
    factors: list[float] = field(default_factory=lambda: [0.316, 0.1])
    last: float = 0.0332


@dataclass(frozen=True)
class LossConfig:
    """`[loss]`: weights of the terms added to the language-model loss, and speed of the load-balancing bias.

    V3: sequence_balance 1e-4, bias_speed 0.001 then 0, mtp 0.3 then 0.1. V2: expert_balance 0.003,
    device_balance 0.05, communication_balance 0.02 with device_groups 8. Terms that do not apply to the model
    are ignored.
    """

    mtp: Steps = 0.3
    bias_speed: Steps = 0.001
    sequence_balance: float = 0.0
    expert_balance: float = 0.0
    device_balance: float = 0.0
    communication_balance: float = 0.0
    device_groups: int = 1


@dataclass(frozen=True)
class LoraConfig:
    """`[lora]`: adapters of rank `rank` on the parts `targets`; rank 0 trains all weights."""

    rank: int = 0
    alpha: float = 16.0
    targets: list[Literal["attention", "mlp", "experts"]] = field(
        default_factory=lambda: ["attention", "mlp", "experts"]
    )


@dataclass(frozen=True)
class DpoConfig:
    """`[dpo]`: the DPO loss (arXiv:2305.18290, eq. 7); `label_smoothing` as in conservative DPO."""

    beta: float = 0.1
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class DistillConfig:
    """`[distill]`: distillation from `teacher` (as `model`), by its logits or, as R1's, by its samples.

    logits: `weight` x KL(teacher || student) at `temperature`, plus (1 - `weight`) x the usual loss. samples:
    SFT on the teacher's answers to the prompts of [data] (`per_prompt` each, up to `max_new_tokens`).
    """

    teacher: str = ""
    by: Literal["logits", "samples"] = "logits"
    weight: float = 1.0
    temperature: float = 1.0
    top_p: float = 0.95
    per_prompt: int = 1
    max_new_tokens: int = 256


@dataclass(frozen=True)
class EvalConfig:
    """`[eval]`: loss on held-out rows before the first step and every `every` steps (0: only at the end).

    A run ends once its held-out loss is below `enough`. GRPO evaluates held-out problems instead; see
    TaskConfig.
    """

    every: int = 100
    rows: int = 64
    enough: float = 0.0


@dataclass(frozen=True)
class CheckpointConfig:
    """`[checkpoint]`: saved at these intervals, at the end and on a signal; newest `keep` and best stay."""

    every: int = 500  # steps
    minutes: float = 15.0
    keep: int = 2


@dataclass(frozen=True)
class LogConfig:
    """`[log]`: write metrics `every` steps to metrics.jsonl and, if enabled, to TensorBoard and wandb."""

    every: int = 1
    tensorboard: bool = True
    wandb: str = ""  # project name; needs wandb
    profile: list[int] = field(default_factory=list)  # [first, last] step to trace for xprof


@dataclass(frozen=True)
class Program:
    """Settings that compiled programs depend on; runs with equal ones share programs within a process."""

    objective: str
    steps: int
    fp8: bool
    remat: str
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    loss: LossConfig
    dpo: DpoConfig
    distill: DistillConfig
    grpo: GrpoConfig
    temperature: float  # rollout.temperature

    def __hash__(self) -> int:
        return hash(repr(self))  # list fields are not hashable


@dataclass(frozen=True)
class RunConfig:
    """A training run. `out` is its directory; starting it again resumes from the last checkpoint there."""

    objective: Literal["pretrain", "sft", "dpo", "distill", "grpo", "reject"]
    model: str  # checkpoint, Hugging Face directory, or a preset with random weights
    out: str
    steps: int
    # A directory; train:SIZE for a new sentencepiece tokenizer; python:MODULE:FUNCTION, which writes one into
    # the directory that it is passed. Default: the model's.
    tokenizer: str = ""
    config: dict[str, Any] = field(default_factory=dict)  # overrides of config.json, such as rope_scaling
    seed: int = 0
    mesh: str = ""  # as --mesh: sizes such as fsdp=8, a strategy TOML or a shipped one's name
    compute_dtype: Literal["", "float32", "bfloat16"] = ""  # default: float32 on CPU, otherwise bfloat16
    fp8: bool = False  # matmuls with inputs rounded to FP8 (DeepSeek-V3 paper, section 3.3)
    remat: Literal["none", "dots", "costly", "full"] = "full"  # see REMAT in model/layer.py
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    rewards: list[RewardConfig] = field(default_factory=list)
    reject: RejectConfig = field(default_factory=RejectConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @classmethod
    def from_toml(cls, path: str | Place, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
        """Read a run file and apply `key=value` overrides (`optimizer.learning_rate=1e-4`).

        Raises ConfigError for invalid TOML, unknown keys, and values of a wrong type or range.
        """
        raw = read_toml(path, overrides)
        try:
            return cls.from_dict(raw)
        except ConfigError as e:
            raise ConfigError(f"{path}: {e}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> RunConfig:
        """Build a run from nested tables, as from TOML or `to_dict`. Raises ConfigError."""
        grpo = raw.get("grpo", {} if raw.get("objective") in ("grpo", "reject") else None)
        if isinstance(grpo, dict):
            preset = str(grpo.get("preset", GrpoConfig.preset))
            raw = raw | {"grpo": PRESETS.get(preset, {}) | grpo}
        return _build(cls, raw, "")

    def to_dict(self) -> dict[str, Any]:
        """Return the run as nested tables; `from_dict(to_dict())` is the identity."""
        return dataclasses.asdict(self)

    @property
    def program(self) -> Program:
        """The settings that the loss, the optimizer and the compiled step depend on."""
        shared = [f.name for f in dataclasses.fields(Program) if f.name != "temperature"]
        return Program(temperature=self.rollout.temperature, **{name: getattr(self, name) for name in shared})

    def replace(self, **changes: Any) -> RunConfig:
        """Return a validated copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def __post_init__(self) -> None:
        problems = []

        def need(ok: bool, text: str) -> None:
            if not ok:
                problems.append(text)

        data, batch, schedule = self.data, self.batch, self.schedule
        for name, least in (
            ("steps", 1), ("data.length", 2), ("batch.size", 1), ("batch.accumulation", 1),
            ("batch.ramp_from", 0), ("schedule.warmup", 0), ("lora.rank", 0), ("eval.every", 0),
            ("eval.rows", 1), ("checkpoint.every", 1), ("checkpoint.keep", 1), ("log.every", 1),
            ("loss.device_groups", 1), ("distill.per_prompt", 1), ("distill.max_new_tokens", 1), ("seed", 0),
        ):  # fmt: skip
            value = _get(self, name)
            need(value >= least, f"{name} is {value}, expected {least} or more")
        for name, most in _MOST.items():
            value = _get(self, name)
            need(value <= most, f"{name} is {value}, expected at most {most:,}")
        for name in ("data.holdout", "data.fim_rate", "batch.ramp_until", "distill.weight", "optimizer.b1",
                     "optimizer.b2", "dpo.label_smoothing"):  # fmt: skip
            need(0 <= _get(self, name) <= 1, f"{name} is {_get(self, name)}, expected 0 to 1")
        for name in ("optimizer.learning_rate", "optimizer.eps", "distill.temperature", "checkpoint.minutes",
                     "dpo.beta", "lora.alpha"):  # fmt: skip
            need(_get(self, name) > 0, f"{name} is {_get(self, name)}, expected above 0")
        for name in ("optimizer.clip", "optimizer.weight_decay"):
            need(_get(self, name) >= 0, f"{name} is {_get(self, name)}, expected 0 or more")
        sampling = self.objective in ("grpo", "reject")
        generated = sampling and self.task.kind in ("arithmetic", "countdown")
        need(bool(data.train) or generated, "data.train names no source, expected a list of files")
        need(
            sampling or batch.size % batch.accumulation == 0,  # these take all the rows that they sample
            f"batch.size {batch.size} is not divisible by batch.accumulation {batch.accumulation}",
        )
        need(
            batch.ramp_from <= batch.size,
            f"batch.ramp_from {batch.ramp_from} is above batch.size {batch.size}",
        )
        wanted = {"multi_step": len(schedule.factors), "v3": 3}.get(schedule.kind)
        if wanted is not None:
            need(
                len(schedule.milestones) == wanted,
                f"schedule.milestones has {len(schedule.milestones)} entries, expected {wanted}",
            )
        need(
            schedule.milestones == sorted(schedule.milestones)
            and all(0 <= m <= 1 for m in schedule.milestones),
            f"schedule.milestones is {schedule.milestones}, expected rising fractions of the run",
        )
        need(
            schedule.warmup < self.steps, f"schedule.warmup {schedule.warmup} is not below steps {self.steps}"
        )
        need(self.objective != "distill" or bool(self.distill.teacher), "distill.teacher is not set")
        if sampling:
            problems += rl_problems(self)
        need(len(self.log.profile) in (0, 2), f"log.profile is {self.log.profile}, expected [first, last]")
        for name in ("loss.mtp", "loss.bias_speed"):
            value = _get(self, name)
            ok = isinstance(value, float) or (
                value
                and all(isinstance(p, list | tuple) and len(p) == 2 for p in value)
                and all(type(n) in (int, float) and math.isfinite(n) for p in value for n in p)
                and value[0][0] == 0
            )
            need(bool(ok), f"{name} is {value}, expected a number or [[0, value], [fraction, value], ...]")
        if problems:
            raise ConfigError("; ".join(problems))


def at_fraction(value: Steps, fraction: float) -> float:
    """Return the value of a `Steps` setting at a fraction of the run."""
    if not isinstance(value, list):
        return float(value)
    return float([v for start, v in value if start <= fraction][-1])


def _get(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def shipped_runs() -> dict[str, Path]:
    """Return the run files shipped with jaxseek, name to path."""
    return {p.stem: p for p in sorted((configs_dir() / "runs").glob("*.toml"))}


def headline(path: Path, width: int = 90) -> str:
    """Return the first sentence of a TOML file's leading comment, shortened to `width` characters."""
    lines = itertools.takewhile(lambda l: l.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.strip("# ") for line in lines)
    return textwrap.shorten(re.split(r"[.;](?:\s|$)|: jaxseek ", text)[0], width, placeholder=" ...")


def is_run_file(name: str) -> bool:
    """Return whether a name is that of a run file (by suffix, or shipped) rather than of a model."""
    return name.endswith(".toml") or name in shipped_runs()


def raise_near_run_file(name: str) -> None:
    """Raise ConfigError if a name is not a model but close to that of a shipped run file."""
    near = difflib.get_close_matches(name, [*shipped_runs(), *presets()], 1, 0.75)
    if near and near[0] in shipped_runs() and name not in presets() and not place(name).exists():
        raise ConfigError(f"{name}: neither a model nor a run file; did you mean {near[0]}?")


def find_run_file(name: str | Place) -> Place:
    """Return the run file at a path or URL, or else the shipped one of this name, with or without .toml.

    Raises ConfigError with similar names if there is none.
    """
    path, shipped = place(name), shipped_runs()
    if path.is_file():
        return path
    known = path.name.removesuffix(".toml")
    if path.parent in (Path(), Path("configs/runs")) and known in shipped:
        return shipped[known]
    near = difflib.get_close_matches(known, shipped, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "jaxseek train --list names the shipped ones"
    raise ConfigError(f"{name}: no such run file; {hint}")


def read_toml(path: str | Place, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """Read the tables of a run file, by path or shipped name, and apply `key=value` overrides.

    Raises ConfigError.
    """
    raw = untrusted.read_toml(find_run_file(path), ConfigError)
    for override in overrides:
        apply_override(raw, override)
    return raw


def apply_override(raw: dict[str, Any], text: str) -> None:
    """Set `key=value` in nested tables; a value that is not TOML is a string. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}: expected key=value, such as optimizer.learning_rate=1e-4")
    parsed: Any = value  # an unquoted string, unless it is TOML
    with contextlib.suppress(ConfigError):
        found = untrusted.parse_toml(f"v = {value}", "", ConfigError)
        parsed = found["v"] if len(found) == 1 else value
    *tables, last = key.strip().split(".")
    if len(tables) > _MOST_TABLES:
        raise ConfigError(f"--set {text[:60]!r}...: no key is in {len(tables):,} tables")
    for table in tables:
        raw = raw.setdefault(table, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"--set {text!r}: {table} is not a table")
    raw[last] = parsed


def _build(cls: Any, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where.rstrip('.')} is {brief(raw)}, expected a table [{where.rstrip('.')}]")
    hints = get_type_hints(cls)
    for key in raw:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1, 0.5)
            home = _find(key)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(hints)}"
            hint = f"it belongs in [{home}]" if home and home != where.rstrip(".") else hint
            raise ConfigError(f"unknown key {where}{key}; {hint}")
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory]
    if missing := [name for name in required if name not in raw]:
        raise ConfigError(f"missing key(s) {', '.join(where + m for m in missing)}")
    return cls(**{key: _convert(hints[key], value, where + key) for key, value in raw.items()})


def _find(key: str) -> str | None:
    """Return the only section with this key, or None if no or several sections have it."""
    sections = {n: t for n, t in get_type_hints(RunConfig).items() if dataclasses.is_dataclass(t)}
    homes = [name for name, t in sections.items() if key in get_type_hints(t)]
    return homes[0] if len(homes) == 1 else None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where + ".")
    if hint == Steps:
        hint = list if isinstance(value, list) else float
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in args], 1)
        hint_text = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{where} is {brief(value)}, expected one of {', '.join(map(repr, args))}{hint_text}"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        whole = isinstance(value, int) and hint is not float
        most = (2**63 - 1 if where == "seed" else _MOST_NUMBER) if whole else 1e38
        if not abs(value) <= most:
            raise ConfigError(f"{where} is {brief(value)}, expected a number up to {most:.10g}")
    if hint is float and type(value) is int:
        return float(value)
    if origin is list:
        if isinstance(value, str) and args[0] is str:
            value = [value]
        if isinstance(value, list | tuple):
            return [_convert(args[0], v, where) for v in value]
    elif origin is dict and isinstance(value, dict) and args[1] is not Any:
        return {key: _convert(args[1], v, f"{where}.{key}") for key, v in value.items()}
    elif type(value) is (origin or hint):
        return value
    wanted = getattr(hint, "__name__", str(hint)) if origin is None else origin.__name__
    raise ConfigError(f"{where} is {brief(value)}, expected {wanted}")
