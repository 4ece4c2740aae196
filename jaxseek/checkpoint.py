"""Checkpoints: a directory that Orbax restores straight onto any mesh, in any dtype.

    config.json     the model, as Hugging Face writes it
    params/         Orbax: one array for each parameter, by dotted path
    jaxseek.json    format version, every parameter's shape and dtype, and where the weights came from
    tokenizer files, where there is a tokenizer

A checkpoint is written beside its destination as `NAME.partial` and renamed when it is whole, so a directory
that has its name is complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jaxseek.config import ModelConfig
from jaxseek.model import DeepSeek
from jaxseek.sharding import fill, parameters

FORMAT = 1
MANIFEST = "jaxseek.json"
DTYPES = ("bfloat16", "float16", "float32")
_CHUNK_BYTES = 64 << 20  # what a restore onto another mesh reads at least


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message holds what was found and what to do."""


class Savable(Protocol):
    """What is saved beside the weights: a tokenizer."""

    def save(self, path: Path, /) -> None: ...


def kind_of(path: str | Path) -> Literal["jaxseek", "hf"] | None:
    """Which kind of checkpoint a directory claims to be; None where it claims nothing."""
    path = Path(path)
    if (path / MANIFEST).is_file() or (path / "params").is_dir():
        return "jaxseek"
    return "hf" if (path / "config.json").is_file() else None


def save(
    model: DeepSeek,
    path: str | Path,
    tokenizer: Savable | None = None,
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint, each parameter in the dtype that it has. On several hosts, all call it.

    `origin` is kept for `read_manifest`. With `overwrite`, an older checkpoint is replaced once this one is
    whole. Raises CheckpointError where the destination is taken or the disk is full.
    """
    arrays = {p: v.get_value() for p, v in parameters(model).items()}
    if arrays.keys() != parameters(DeepSeek.abstract(model.cfg)).keys():
        raise ValueError("this model has other stacks than its config: save the one it was unrolled from")
    manifest = {
        "format": FORMAT,
        "params": {p: {"shape": list(a.shape), "dtype": a.dtype.name} for p, a in arrays.items()},
        "origin": dict(origin or {}),
    }
    with new_directory(path, sum(a.nbytes for a in arrays.values()), overwrite) as partial:
        _orbax_save(partial / "params", arrays)
        if jax.process_index() == 0:
            cfg = model.cfg.replace(dtype=main_dtype({p: (a.shape, a.dtype) for p, a in arrays.items()}))
            write_json(partial / "config.json", cfg.to_hf())
            if tokenizer is not None:
                tokenizer.save(partial)
            write_json(partial / MANIFEST, manifest)


def restore(path: str | Path, mesh: Any = None, dtype: Any = None, mtp: bool = True) -> DeepSeek:
    """The model of a checkpoint, on any mesh; `dtype` casts all but what is float32 by design.

    Without `mtp` the multi-token module is left out. Raises CheckpointError where the directory is no checkpoint,
    an interrupted or a newer one, or does not fit its config.
    """
    path = Path(path)
    held = read_manifest(path)["params"]
    cfg = ModelConfig.from_hf(path / "config.json")
    if not mtp:
        cfg = cfg.replace(num_nextn_predict_layers=0)
        held = {p: h for p, h in held.items() if not p.startswith("mtp.")}
    model = DeepSeek.abstract(cfg, mesh, jnp.bfloat16)
    expected = {p: v.get_value() for p, v in parameters(model).items()}
    raise_mismatch(
        f"{path / MANIFEST} and config.json do not fit each other",
        {p: tuple(h["shape"]) for p, h in held.items()},
        {p: a.shape for p, a in expected.items()},
        "they were written together: restore the original config.json",
    )
    on, dtypes = model.strategy.make_mesh(), {p: param_dtype(a, dtype, held[p]["dtype"]) for p, a in expected.items()}
    shardings = {p: NamedSharding(on, a.sharding.spec) for p, a in expected.items()}
    arrays = _orbax_restore(path / "params", expected, shardings, dtypes)
    return fill(model, on, lambda p, *_: arrays[p])


def read_manifest(path: Path) -> dict[str, Any]:
    """`jaxseek.json` of a checkpoint. Raises CheckpointError, as `restore` does."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, _, _ = manifest["format"], manifest["params"], manifest["origin"]
    except FileNotFoundError:
        raise CheckpointError(_why_not(path)) from None
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read ({type(e).__name__}: {e})") from None
    if version != FORMAT:
        raise CheckpointError(f"{path}: has format {version!r}, this jaxseek reads {FORMAT}; update jaxseek")
    return manifest


def _why_not(path: Path) -> str:
    if (path / "params").is_dir() or path.name.endswith(".partial"):
        return f"{path}: has no {MANIFEST}, so the save was interrupted; save it again"
    if kind_of(path) == "hf":
        return f"{path}: is a Hugging Face checkpoint; convert it first (jaxseek convert {path} DST)"
    if not path.exists():
        unfinished = _partial(path).exists()
        hint = f"; {_partial(path)} is one that was interrupted: save it again" if unfinished else ""
        return f"{path}: no such checkpoint{hint}"
    return f"{path}: is no checkpoint; expected a directory with {MANIFEST}, config.json and params/"


# -------------------------------------------------------------------- shared with the converter


def param_dtype(abstract: jax.ShapeDtypeStruct, dtype: Any, source: Any) -> np.dtype:
    """A parameter's dtype: float32 by design (of a model made in bfloat16), else as asked, else its source's."""
    if abstract.dtype == jnp.float32:
        return np.dtype(np.float32)
    if dtype is None:
        return jnp.dtype(source)
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = dtype
    if name not in DTYPES:
        raise CheckpointError(f"dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    return jnp.dtype(name)


def main_dtype(specs: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> str:
    """The dtype that most elements have, which config.json names."""
    count = Counter()
    for shape, dtype in specs.values():
        count[dtype.name] += math.prod(shape)
    return count.most_common(1)[0][0]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def raise_mismatch(
    what: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], advice: str
) -> None:
    """Raise CheckpointError unless names and shapes are the same; one error names everything that differs."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{n} is {list(found[n])}, expected {list(expected[n])}"
            for n in expected
            if n in found and tuple(found[n]) != tuple(expected[n])
        ],
    }
    lines = [
        f"  {len(names)} {problem}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for problem, names in problems.items()
        if names
    ]
    if lines:
        raise CheckpointError("\n".join([f"{what}:", *lines, f"  {advice}"]))


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def new_directory(path: str | Path, needed: int, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into, which becomes `path` when all went well and vanishes when not.

    `needed` bytes must be free. With `overwrite`, `path` may be a checkpoint, which is removed at the end.
    """
    path = Path(path).absolute()
    partial, old = _partial(path), path.with_name(path.name + ".old")
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken and not overwrite:
        raise CheckpointError(f"{path}: already exists; choose another name, or overwrite it")
    if taken and kind_of(path) is None:
        raise CheckpointError(f"{path}: already exists and is no checkpoint, so it is not overwritten")
    parent = next(p for p in path.parents if p.exists())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise CheckpointError(f"{path}: needs {_size(needed)}, but {parent} has {_size(free)} free")
    leader = jax.process_index() == 0
    if leader:
        shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left
        partial.mkdir(parents=True)
    _meet("created")
    try:
        yield partial
        _meet("written")
        if leader:
            if taken:
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            partial.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        _meet("renamed")
    except BaseException as e:
        if leader:
            shutil.rmtree(partial, ignore_errors=True)
        if _is_full(e):
            free = shutil.disk_usage(parent).free
            raise CheckpointError(
                f"{path}: the disk of {parent} is full; {_size(needed)} are needed, {_size(free)} are free now that "
                "what was written is removed"
            ) from e
        raise


def _meet(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"checkpoint {where}")


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n:,} bytes"


def _is_full(e: BaseException | None) -> bool:
    while e is not None:
        if (isinstance(e, OSError) and e.errno == errno.ENOSPC) or "No space left" in str(e):
            return True
        e = e.__cause__ or e.__context__
    return False


# -------------------------------------------------------------------- Orbax


def _orbax_save(path: Path, arrays: dict[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp  # a third of a second to import

    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), arrays)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(arrays, save_args=args))


def _orbax_restore(
    path: Path,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
    dtypes: Mapping[str, np.dtype],
) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    args = {
        p: ocp.ArrayRestoreArgs(sharding=shardings[p], global_shape=a.shape, dtype=dtypes[p])
        for p, a in expected.items()
    }
    wanted = ocp.args.PyTreeRestore(dict.fromkeys(args, 0), restore_args=args, partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path.absolute(), args=wanted)
    except (ValueError, KeyError, OSError) as e:
        raise CheckpointError(
            f"{path}: cannot be restored, so the checkpoint is damaged or its copy incomplete "
            f"({type(e).__name__}: {str(e)[:500]})"
        ) from e
