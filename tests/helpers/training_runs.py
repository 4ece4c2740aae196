"""Tiny models with a tokenizer and data of every kind, and runs that train them in seconds."""

import json
from pathlib import Path

import numpy as np
from oracles import tiny_config

from jaxseek.checkpoint import models
from jaxseek.config.run import RunConfig
from jaxseek.model.deepseek import DeepSeek
from jaxseek.sharding.parameters import parameters
from jaxseek.tokenizer.tokenizer import train_sentencepiece
from jaxseek.train import start
from jaxseek.train.metrics import read_metrics
from jaxseek.train.step import with_values

STEPS = 8
TEXT = "the quick brown fox jumps over the lazy dog while seven wizards boil green tea for the king. "
DENSE = tiny_config("llama", num_hidden_layers=2, vocab_size=320, initializer_range=0.1)
SPARSE = tiny_config(
    "v3",
    vocab_size=320,
    initializer_range=0.1,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    num_nextn_predict_layers=0,
)


def make_home(home: Path) -> Path:
    """A directory with models (dense, sparse, a teacher) that have a tokenizer, and data of every kind."""
    tokenizer = train_sentencepiece([TEXT * 20], 310, home / "tokenizer")
    for name, cfg, seed in (("dense", DENSE, 0), ("sparse", SPARSE, 0), ("teacher", DENSE, 1)):
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_ids[0]}
        model = DeepSeek.init(cfg.replace(**ids), seed=seed)
        if name == "teacher":  # it ends what it says, often soon
            head_DV = parameters(model)["head_DV"][...]
            model = with_values(model, {"head_DV": head_DV.at[:, tokenizer.eos_ids[0]].multiply(-5)})
        models.save(model, home / name, tokenizer)
    words = TEXT.split()
    phrases = [" ".join(words[i % 9 : i % 9 + 3 + i % 5]) for i in range(24)]
    write_jsonl(home / "text.jsonl", [{"text": p} for p in phrases])
    write_jsonl(home / "talk.jsonl", [{"prompt": p, "response": p[::-1][:8]} for p in phrases])
    pairs = [{"prompt": p, "chosen": "the king", "rejected": "dog"} for p in phrases[:8]]
    write_jsonl(home / "pairs.jsonl", pairs)
    return home


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def run(home, out, objective="pretrain", **sections):
    data = {"pretrain": "text", "distill": "text"}.get(
        objective, {"sft": "talk", "dpo": "pairs"}.get(objective)
    )
    raw = {
        "objective": objective,
        "model": str(home / "dense"),
        "out": str(out),
        "steps": STEPS,
        "data": {"train": str(home / f"{data}.jsonl"), "length": 32},
        "batch": {"size": 4},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"kind": "constant"},
        "log": {"tensorboard": False},
    }
    for key, value in sections.items():
        raw[key] = raw.get(key, {}) | value if isinstance(value, dict) else value
    return RunConfig.from_dict(raw)


def toml(config, path):
    """The run as a file of dotted keys."""

    def shown(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {shown(v)}" for key, v in value.items()) + "}"
        return f"[{', '.join(map(shown, value))}]" if isinstance(value, list) else json.dumps(value)

    flat = start._flat(config.to_dict())
    path.write_text("".join(f"{key} = {shown(value)}\n" for key, value in flat.items()), "utf-8")
    return str(path)


def losses(out, name="loss"):
    """By step; no step twice."""
    found = [(r["step"], r[name]) for r in read_metrics(out) if name in r]
    assert len(dict(found)) == len(found)
    return dict(found)


def exported(out):
    return {p: np.asarray(v[...]) for p, v in parameters(models.restore(Path(out) / "model")).items()}


def assert_same_bits(a, b):
    a, b = exported(a), exported(b)
    assert a.keys() == b.keys()
    for path in a:
        assert models.same_bits(a[path], b[path]), path
