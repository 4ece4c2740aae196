"""`jaxseek convert`: read a checkpoint of either kind (or a GGUF file), write one of either, verify."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxseek import checkpoint
from jaxseek.checkpoint import CheckpointError
from jaxseek.model import DeepSeek
from jaxseek.sharding import parameters
from jaxseek.tokenizer import Tokenizer
from jaxseek_convert.from_hf import HFCheckpoint
from jaxseek_convert.gguf import gguf_to_hf, is_gguf
from jaxseek_convert.safetensors_io import bytes_of
from jaxseek_convert.to_hf import hf_specs, save_hf

Stage = Callable[[str, int], Callable[[int], None]]  # a stage's name and bytes -> to be told of bytes done


def convert(
    src: str | Path,
    dst: str | Path,
    to: Literal["jaxseek", "hf"] = "jaxseek",
    dtype: Any = None,
    mesh: Any = None,
    mtp: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the checkpoint `src` as a checkpoint `dst`, verify it, and return what was done, ready for JSON.

    `src` is a Hugging Face directory, a jaxseek checkpoint, or what gguf.py reads. Without `dtype` every
    tensor keeps its own, and HF to jaxseek to HF gives the same tensors bit for bit (FP8 becomes bfloat16).
    Tensors of a Hugging Face source are compared with the model once more, and all of `dst` is read back,
    before it gets its name. Raises CheckpointError, ConfigError or TokenizerError; then there is no `dst`, or
    the older one.
    """
    start, place = time.monotonic(), Path(dst)
    if to not in ("jaxseek", "hf"):
        raise CheckpointError(f"to is {to!r}, expected 'jaxseek' or 'hf'")
    if place.resolve() in (Path(src).resolve(), *Path(src).resolve().parents):
        raise CheckpointError(
            f"{dst}: is or holds the checkpoint to be converted; choose another destination"
        )
    checkpoint.check_destination(place, 0, overwrite)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:9}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        _folder_of(src, place) as folder,
        Progress(*columns, TimeRemainingColumn(), console=console, disable=not progress) as bars,
    ):

        def stage(name: str, total: int) -> Callable[[int], None]:
            bar = bars.add_task(name, total=total)
            return lambda n: bars.advance(bar, n)

        check = lambda needed: checkpoint.check_destination(place, needed, overwrite)
        model, origin = _read(folder, dtype, mesh, mtp, stage, check)
        beside = _Beside(folder, Tokenizer.from_dir(folder))
        if beside.tokenizer is not None:
            beside.tokenizer.check_fits(model.cfg.vocab_size)
        size = sum(v.get_value().nbytes for v in parameters(model).values())
        if to == "hf":
            total = 2 * bytes_of(hf_specs(model, origin=origin))  # there and back
            done = stage("write", total)
            save_hf(model, dst, None, beside, origin=origin, overwrite=overwrite, check=True, progress=done)
        else:
            done = stage("write", 2 * size)
            checkpoint.save(model, dst, beside, origin, overwrite, check=True)
            done(2 * size)
    written, seconds = sum(checkpoint.file_sizes(place).values()), time.monotonic() - start
    if progress:
        console.print(
            f"{dst}: {size / 1e9:.2f} GB of weights in {seconds:.1f} s, every tensor read back", style="green"
        )
    return {
        "src": str(src),
        "dst": str(dst),
        "to": to,
        "model_type": model.cfg.model_type,
        "parameters": sum(v.get_value().size for v in parameters(model).values()),
        "mtp": model.cfg.num_nextn_predict_layers,
        "dtype": checkpoint.stored_dtype(model),
        "bytes": size,
        "bytes_on_disk": written,
        "seconds": round(seconds, 3),
        "tokenizer": beside.tokenizer is not None,
    }


def _read(
    path: Path, dtype: Any, mesh: Any, mtp: bool, stage: Stage, check: Callable[[int], Any]
) -> tuple[DeepSeek, dict[str, Any]]:
    """The model of either kind of checkpoint, and what else is needed to write it as it was.

    `check` is told how many bytes will be written, before they are read.
    """
    kind = checkpoint.kind_of(path)
    if kind is None:
        raise checkpoint.not_a_checkpoint(path)
    if kind == "hf":
        source = HFCheckpoint(path, mtp)
        size = source.size(dtype)
        check(size)
        model = source.load(mesh, dtype, stage("read", size))
        source.check(model, stage("compare", sum(t.nbytes for t in source.tensors.values())))
        origin = source.origin(model)
    else:
        size = sum(checkpoint.file_sizes(path / "params").values())
        done = stage("read", size)
        model = checkpoint.restore(path, mesh, dtype, mtp)
        done(size)
        origin = checkpoint.read_manifest(path)["origin"]
    return model, origin if dtype is None else origin | {"dtypes": {}}


@dataclass
class _Beside:
    """What lies beside the weights and is copied byte for byte: tokenizer files, generation_config.json."""

    folder: Path
    tokenizer: Tokenizer | None

    def save(self, path: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save(path)
        generation = self.folder / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, path / generation.name)


@contextlib.contextmanager
def _folder_of(src: str | Path, dst: Path) -> Iterator[Path]:
    """The directory to read: `src`, or what a GGUF file becomes, beside `dst` for as long as it is needed."""
    if not is_gguf(src):
        yield Path(src)
        return
    scratch = dst.with_name(dst.name + ".jaxseek-gguf")
    try:
        yield gguf_to_hf(src, scratch, overwrite=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
