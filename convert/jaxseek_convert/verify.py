"""`jaxseek verify`: check that a checkpoint is intact and computes the same logits as its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxseek.checkpoint.digests import NAME, Digests
from jaxseek.checkpoint.directory import CheckpointError
from jaxseek.config.model import ModelConfig
from jaxseek.machine.host_memory import free_memory
from jaxseek.model.deepseek import DeepSeek
from jaxseek.sharding.parameters import fill
from jaxseek.storage.hub import model_place
from jaxseek.storage.place import Place
from jaxseek.storage.untrusted import expect, read_json
from jaxseek_convert import stream
from jaxseek_convert.checksums import check_sums, known_sums
from jaxseek_convert.conversion import Source, Stage, differing, opened, source_place
from jaxseek_convert.from_hf import HFCheckpoint
from jaxseek_convert.numbers import F32, Form, decode
from jaxseek_convert.table import Table
from jaxseek_convert.tensors import StoreCheckpoint, StoreSink
from jaxseek_convert.to_hf import HFSink

_TOKENS = (2, 16)  # batch and length of the logits check


def verify(
    path: str | Path,
    source: str | Path | None = None,
    *,
    memory: int | None = None,
    stage: Stage,
    seed: int = 0,
) -> dict[str, Any]:
    """Check a checkpoint and return the findings, ready for JSON; `ok` is the verdict.

    Names and shapes must match its config. Every byte is compared with the digests noted when it was written,
    or with the hub's checksums if a download has them. With `source` (anything that `convert` takes), every
    tensor of the source is converted again in memory and must be identical, and both checkpoints compute the
    logits of the same random tokens (`logits`), with as many of the first layers as fit into half of the
    free memory. Raises CheckpointError if a checkpoint cannot be opened.
    """
    folder = model_place(path)
    found = opened(folder)
    threads = stream.threads_for(memory)
    result: dict[str, Any] = {"path": str(path), "tensors": len(found.tensors), "ok": True}
    by_tensor = read_digests(folder)
    if by_tensor is not None:
        if names := set(by_tensor) ^ set(_digested(found)):
            raise CheckpointError(f"{folder / NAME}: has other tensors than the checkpoint, as {min(names)}")
        result["damaged"] = differing(folder, found.spans, by_tensor, threads, stage)
    elif isinstance(found, StoreCheckpoint) and found.digests.files:
        damaged = found.digests.damaged(progress=stage("verify", found.digests.nbytes))
        result["damaged"] = _named(found, damaged)
    elif isinstance(folder, Path) and known_sums(folder):
        check_sums(folder, stage)
        result["damaged"] = []
    result["digests"] = "damaged" in result
    result["ok"] = not result.get("damaged")
    if result["ok"] and isinstance(found, HFCheckpoint):
        found.check_copies()
    if source is not None:
        if isinstance(found, StoreCheckpoint):
            found.digests = Digests(folder, {})  # its damage is known
        with source_place(source, folder) as at:
            origin = opened(at, bool(found.cfg.num_nextn_predict_layers))
            if isinstance(origin, StoreCheckpoint):
                origin.check_files(stage)
            result["unlike_source"] = _differences(origin, found, threads, stage)
            result["logits"] = compare_logits(origin, found, seed)
            exact = all(_represents(found.form(n), origin.form(n)) for n in _own(found))
        same = not exact or result["logits"].get("max_difference", 0) == 0
        result["ok"] = result["ok"] and not result["unlike_source"] and same
    return result


def read_digests(folder: Place) -> dict[str, dict[str, str]] | None:
    """Return the digests by tensor, of a Hugging Face directory or by an older jaxseek; None without them."""
    place = folder / NAME
    if not place.is_file():
        return None
    form = {"tensors?": {str: {str: str}}, "files?": dict}
    raw = expect(read_json(place, CheckpointError), form, str(place), CheckpointError)
    return None if "files" in raw else raw.get("tensors")


def _named(source: StoreCheckpoint, damaged: list[tuple[str, int]]) -> list[str]:
    """Name damaged parts of files by their tensor, or by the file where it holds no chunk."""
    names = {}
    if source.flat:
        for name in _own(source):
            for _, file, start, _ in source.spans(name):
                names[file, start] = name
    return list(dict.fromkeys(names.get(part, part[0]) for part in damaged))


def _digested(source: Source) -> list[str]:
    """Return the tensors that a conversion records digests for; a store has no copies."""
    return _own(source) if isinstance(source, StoreCheckpoint) else list(source.tensors)


def _own(source: Source) -> list[str]:
    return [name for name, row, _ in source.table if row.kind == "own"]


def _represents(form: Form, other: Form) -> bool:
    """Return whether `form` represents every value of `other` exactly."""
    return form == other or form.kind == F32.name


def _differences(origin: Source, found: Source, threads: int, stage: Stage) -> list[str]:
    """Return the tensors that differ from a fresh conversion of the source."""
    names = _own(found)
    if missing := found.table.params.keys() - origin.table.params.keys():
        raise CheckpointError(f"{origin.path}: is no source of {found.path}, it has no {min(missing)}")
    if isinstance(found, StoreCheckpoint):
        sink = StoreSink(found.table, found.forms)
    else:
        sink = HFSink(found.table, {n: found.form(n) for n in names})
    layouts = {name: row.layout for name, row, _ in found.table}
    done = stage("compare", sum(map(origin.nbytes, names)))
    expected = dict(stream.digest_source(origin, sink, layouts, names, threads, done))
    actual = dict(stream.digest_source(found, sink, layouts, names, threads, lambda _: None))
    return [n for n in names if expected[n] != actual[n]]


# -------------------------------------------------------------------- logits


def compare_logits(a: Source, b: Source, seed: int) -> dict[str, Any]:
    """Compare the float32 logits of two checkpoints for random tokens, with as many layers as fit."""
    cfg = _shortened(b.cfg)
    if cfg is None:
        return {"layers": 0, "why": "not even one layer in float32 fits into half of the free memory"}
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, _TOKENS)
    first, second = (np.asarray(float32_model(source, cfg)(tokens), np.float64) for source in (a, b))
    p, q = (jax.nn.log_softmax(jnp.asarray(x), axis=-1) for x in (first, second))
    return {
        "layers": cfg.num_hidden_layers,
        "max_difference": float(np.abs(first - second).max()),
        "kl": float((jnp.exp(p) * (p - q)).sum(-1).mean()),
        "same_token": float((first.argmax(-1) == second.argmax(-1)).mean()),
    }


def _shortened(cfg: ModelConfig) -> ModelConfig | None:
    """Shorten the model to as many first layers as fit, in float32, into half of the free memory.

    Returns None if not even one fits.
    """
    room = free_memory() // 2
    for layers in range(cfg.num_hidden_layers, 0, -1):
        short = cfg.replace(num_hidden_layers=layers, num_nextn_predict_layers=0)
        if 4 * short.num_params() <= room:
            return short
    return None


def float32_model(source: Source, cfg: ModelConfig) -> DeepSeek:
    """Load a checkpoint as a float32 model on one device; `cfg` may have fewer layers."""
    table = Table(cfg)

    def fetch(name: str, index: Any) -> np.ndarray:
        rows = source.rows(name, 0, layouts[name].shape[0])
        return decode(rows, source.form(name), F32)[index]

    layouts = {name: row.layout for name, row, _ in table}

    def make(path: str, param: nnx.Variable, sharding: NamedSharding) -> jax.Array:
        out = np.empty(param.get_value().shape, np.float32)
        table.row_of(path).read(path, tuple(slice(0, n) for n in out.shape), out, fetch)
        return jax.device_put(out, sharding)

    model = DeepSeek.abstract(cfg)
    return fill(model, model.strategy.make_mesh(), make)
