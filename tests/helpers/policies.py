"""Tiny policies that answer at random and often end early, and runs that train them by GRPO in seconds."""

import functools
import json
from pathlib import Path

from oracles import random_model, tiny_config

from jaxseek.checkpoint import models
from jaxseek.config.run import RunConfig
from jaxseek.recipes.pipeline import run_stage
from jaxseek.rl.arithmetic import character_tokenizer
from jaxseek.train.metrics import read_metrics

# A sixth of the tokens ends an answer: lengths differ, and so do rewards of kind length.
ENDS = {"vocab_size": 48, "bos_token_id": 1, "eos_token_id": (2, 6, 7, 8, 20, 21, 22, 23)}
POLICIES = {
    "dense": tiny_config("llama", num_hidden_layers=1, max_position_embeddings=64, **ENDS),
    "sparse": tiny_config(
        "v3",
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
        max_position_embeddings=64,
        **ENDS,
    ),
}


def make_home(home: Path) -> Path:
    """A directory with the policies as checkpoints with a tokenizer."""
    tokenizer = character_tokenizer(home / "tokenizer")
    for name, cfg in POLICIES.items():
        models.save(random_model(cfg), home / name, tokenizer)
    return home


def config(home, out, model="sparse", **sections) -> RunConfig:
    """A run of three steps; sections are merged into its own."""
    raw = {
        "objective": "grpo",
        "model": str(home / model) if (home / model).exists() else model,
        "out": str(out),
        "steps": 3,
        "tokenizer": str(home / "tokenizer"),
        "compute_dtype": "float32",
        "remat": "none",
        "task": {"kind": "arithmetic", "template": "plain", "terms": 2, "held_out": 8},
        "rollout": {"prompts": 2, "max_prompt_tokens": 8, "max_new_tokens": 8},
        "grpo": {"group_size": 4, "beta": 0.0},
        "rewards": [{"kind": "length", "target": 3}, {"kind": "exact"}],
        "batch": {"accumulation": 2},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0},
        "schedule": {"kind": "constant"},
        "eval": {"every": 0},
        "log": {"tensorboard": False},
    }
    for key, value in sections.items():
        raw[key] = raw.get(key, {}) | value if isinstance(value, dict) else value
    return RunConfig.from_dict(raw)


def trained(home, out, model="sparse", **sections):
    """The metrics of each step of a run."""
    run_stage(config(home, out, model, **sections))
    return steps_of(out)


def steps_of(out):
    """The records of training steps (not of evaluations), in order; no step twice."""
    found = [r for r in read_metrics(out) if "reward" in r]
    assert [r["step"] for r in found] == list(range(len(found)))
    return found


def values_of(records, *names):
    return [{name: r[name] for name in names if name in r} for r in records]


SAME = (
    "reward", "reward_std", "loss", "grad_norm", "gap_max", "kl", "entropy", "tokens", "flat_groups",
    "learning_rate", "sampling_rounds", "rerouted", "prompts_too_long", "reward_failures", "ratio_max",
)  # fmt: skip


def answers_in(out, step):
    lines = (Path(out) / "answers" / f"{step:06}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@functools.cache
def policy(name="sparse", mesh=None):
    return random_model(POLICIES[name], mesh)
