"""`jaxseek convert`: write any checkpoint as jaxseek or Hugging Face, tensor by tensor, resumable."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxseek.checkpoint import digests, directory, models
from jaxseek.checkpoint.directory import CheckpointError
from jaxseek.checkpoint.store import LAYOUT, write_metadata
from jaxseek.machine.host_memory import peak_memory
from jaxseek.machine.hosts import gather
from jaxseek.machine.terminal import PlainConsole
from jaxseek.model.weight import MATRICES
from jaxseek.storage.hub import HUB, model_place
from jaxseek.storage.place import Place, Remote, file_sizes, place, remove, scratch, writable, write_bytes
from jaxseek.tokenizer.folder import read as tokenizer_files
from jaxseek.tokenizer.tokenizer import Tokenizer
from jaxseek_convert import stream
from jaxseek_convert.carried import carry
from jaxseek_convert.checksums import check_sums
from jaxseek_convert.files import Uploader, Writer
from jaxseek_convert.from_hf import HFCheckpoint
from jaxseek_convert.gguf import PACKAGE, gguf_to_hf, is_gguf
from jaxseek_convert.numbers import BF16, BLOCK, F32, QUANTIZED, Form, float8
from jaxseek_convert.tensors import StoreCheckpoint, StoreSink, described
from jaxseek_convert.to_hf import HFSink

Source = HFCheckpoint | StoreCheckpoint
Stage = Callable[[str, int], Callable[[int], None]]  # (stage name, total bytes) -> report(bytes done)
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "float8": "fp8"}  # other names


def convert(
    src: str | Place,
    dst: str | Place,
    to: Literal["jaxseek", "hf"] = "jaxseek",
    dtype: Any = None,
    mtp: bool = True,
    overwrite: bool = False,
    progress: bool = True,
    *,
    memory: int | None = None,
    verify: bool = False,
    checksums: bool = True,
) -> dict[str, Any]:
    """Convert the checkpoint `src` to `dst` and return a JSON-serialisable report.

    `src` is a Hugging Face directory, a URL or `hf://` name of one, a jaxseek checkpoint, or anything that
    gguf.py reads. Without `dtype` every tensor keeps its dtype, FP8 with its scales, and HF to jaxseek to HF
    reproduces the tensors bit for bit. `dtype` is the name of a float dtype, or `fp8`, `int8` or `int4`
    for the linear and expert matrices. The process uses at most `memory` bytes (default: 1.5 GiB on top of
    what it holds at the call). With `verify` the output is read back and compared with the digests of the
    data that was sent to it, before `dst` gets its name. After a kill or an error, the same call resumes. On
    several hosts, every host makes the call and writes its share. Raises CheckpointError, ConfigError,
    TokenizerError or PlaceError, and then leaves `dst` unchanged.
    """
    start, to_place = time.monotonic(), writable(dst)
    if to not in ("jaxseek", "hf"):
        raise CheckpointError(f"to is {to!r}, expected 'jaxseek' or 'hf'")
    if _contains(to_place, src):
        raise CheckpointError(
            f"{dst}: is or holds the checkpoint to be converted; choose another destination"
        )
    host, hosts = jax.process_index(), jax.process_count()
    console, progress = PlainConsole(stderr=True), progress and host == 0
    with (
        directory.resumable_directory(to_place, stream.JOURNAL, overwrite) as draft,
        source_place(src, to_place) as at,
        bars(progress, console) as stage,
    ):
        with _all_or_none(src):
            source = opened(at, mtp, checksums)
            if isinstance(source, HFCheckpoint):
                source.check_copies()
            forms = target_forms(source, to, dtype)
            origin = source.origin(forms)
            beside = Beside(at, Tokenizer.beside(at, source.cfg.vocab_size))
            sink, finish = sink_for(source, forms, origin, to)
            layouts = {name: row.layout for name, (row, _) in sink.tensors.items()}
            working = stream.working_memory(layouts, source.form, sink.form)
            threads = stream.threads_for(memory, working + source.memory.thread, source.memory.shared)
            identity = {
                "source": source.identity(),
                "digests": "by file" if to == "jaxseek" else "by tensor",
                "sink": [
                    to,
                    {path: form.__dict__ for path, form in forms.items()},
                    sorted(sink.files.items()),
                ],
            }
        groups = stream.groups(sink)
        host_groups = stream.share(groups, host, hosts)
        writer: Writer = Writer(draft.files, sink.files)
        if isinstance(draft.weights, Remote):
            writer = Uploader(draft.files / "sending", sink.files, draft.weights, draft.check)
        draft.begin()
        with contextlib.closing(stream.Journal(draft.weights, identity)) as journal:
            with _all_or_none(src):
                if host == 0:
                    _check_room(draft, sink, groups, threads)
                    _resume(draft.weights, sink, journal, threads, stage)
            journal.done = gather(journal.done)[0]
            resumed = len(journal.done)
            with _all_or_none(src):
                if isinstance(source, StoreCheckpoint):
                    source.check_files(stage)
                elif checksums and host == 0 and isinstance(at, Path) and not resumed:
                    check_sums(at, stage)
                names = [name for group in host_groups for name in group.names]
                done = stage("convert", sum(map(source.nbytes, names)))
                done(sum(source.nbytes(name) for name in names if name in journal.done))
                stream.pump(source, sink, layouts, journal, host_groups, writer, threads, done)
                if source.identity() != identity["source"]:
                    raise CheckpointError(
                        f"{src}: was changed while it was read, expected the same files from start to end; "
                        "the same command starts anew"
                    )
            journal.share()
            with _all_or_none(src):
                if verify:
                    host_digests = {name: journal.done[name] for name in names}
                    if bad := differing(draft.weights, sink.spans, host_digests, threads, stage):
                        journal.forget(bad)
                        raise CheckpointError(
                            f"{dst}: {len(bad)} tensors were read back with other values, as {bad[0]}; is "
                            "the disk sound? The same command writes them again"
                        )
            if host == 0:
                finish(draft.files, beside)
                carry(at, draft.files)
                if to == "jaxseek":
                    _write_manifest(draft, source, forms, origin)
                    weights = sink.digests(journal.done)
                    besides = [n for n in file_sizes(draft.files) if n not in weights and not _ours(n)]
                    digests.write(draft.files, weights | digests.note(draft.files, besides))
                else:
                    noted = {"algorithm": "xxh3-128", "tensors": dict(sorted(journal.done.items()))}
                    models.write_json(draft.files / digests.NAME, noted, indent=None)
    seconds = time.monotonic() - start
    if progress:
        console.print(
            f"{dst}: {sum(sink.files.values()) / 1e9:.2f} GB of weights in {seconds:.1f} s"
            + (", every tensor read back" if verify else ""),
            style="green",
        )
    return {
        "src": str(src),
        "dst": str(dst),
        "to": to,
        "model_type": source.cfg.model_type,
        "parameters": source.cfg.num_params(mtp=True),
        "mtp": source.cfg.num_nextn_predict_layers,
        "dtype": main_kind(source, forms),
        "bytes": sum(sink.files.values()),
        "bytes_on_disk": sum(file_sizes(to_place).values()),
        "seconds": round(seconds, 3),
        "tokenizer": beside.tokenizer is not None,
        "tensors": len(sink.tensors),
        "tensors_resumed": resumed,
        "threads": threads,
        "peak_memory_bytes": peak_memory(),
    }


def _contains(dst: Place, src: str | Place) -> bool:
    """Return whether `dst` is `src` or one of its parent folders."""
    if str(src).startswith((HUB, PACKAGE)):
        return False
    source, to = place(src), place(dst)
    if isinstance(source, Path) and isinstance(to, Path):
        return to.resolve() in (source.resolve(), *source.resolve().parents)
    return f"{source}/".startswith(f"{to}/")


@contextlib.contextmanager
def _all_or_none(src: str | Place) -> Iterator[None]:
    """Stop the conversion on all hosts when one fails; the others raise CheckpointError."""
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    told = gather(None if error is None else str(error))
    if error is not None:
        raise error
    if failed := [(host, text) for host, text in enumerate(told) if text is not None]:
        raise CheckpointError(f"{src}: host {failed[0][0]} failed: {failed[0][1]}")


def _check_room(draft: directory.Draft, sink: stream.Sink, groups: list[stream.Group], threads: int) -> None:
    """Raise CheckpointError unless the disk has room for the remaining files.

    For an object store, the local disk must hold the files that are staged for upload at the same time.
    """
    if isinstance(draft.weights, Remote):
        largest = sorted((group.nbytes for group in groups), reverse=True)
        directory.check_room(draft.files, sum(largest[: threads + 1]))
        return
    allocated = sum(f.stat().st_blocks * 512 for f in draft.files.rglob("*") if f.is_file())
    directory.check_room(draft.weights, sum(sink.files.values()) - allocated)


def _resume(weights: Place, sink: stream.Sink, journal: stream.Journal, threads: int, stage: Stage) -> None:
    """Take tensors out of the journal whose files are missing, resized or, after a reboot, damaged."""
    if journal.done:
        found = file_sizes(weights)
        lost = {file for file, size in sink.files.items() if found.get(file) != size}
        journal.forget([n for n in journal.done if any(file in lost for _, file, *_ in sink.spans(n))])
    if journal.restarted:
        journal.forget(differing(weights, sink.spans, journal.done, threads, stage))
        journal.trust()


def opened(at: Place, mtp: bool = True, checksums: bool = True) -> Source:
    """Open a jaxseek or Hugging Face checkpoint for reading."""
    kind = models.kind_of(at)
    if kind is None:
        raise models.not_a_checkpoint(at)
    return HFCheckpoint(at, mtp) if kind == "hf" else StoreCheckpoint(at, mtp, checksums)


def parse_dtype(dtype: Any) -> str | None:
    """Return the full name of the dtype to store matrices in. Raises CheckpointError for an unknown one."""
    name = DTYPES.get(str(dtype), dtype)
    if name is None or name in QUANTIZED:
        return name
    with contextlib.suppress(CheckpointError):
        return models.parse_dtype(name).name
    raise CheckpointError(f"dtype is {dtype!r}, expected one of {', '.join((*models.DTYPES, *QUANTIZED))}")


def target_forms(source: stream.Described, to: str, dtype: Any) -> dict[str, Form]:
    """Return the form to write each parameter in, by path.

    Raises CheckpointError where the model or the destination does not allow `dtype`.
    """
    name = parse_dtype(dtype)
    eight = float8(source.quantization)

    def form(path: str) -> Form:
        abstract, current = source.table.params[path], source.forms[path]
        if abstract.dtype == F32:  # float32 by design, such as router biases
            return Form(F32.name)
        is_matrix = path.rpartition(".")[2] in MATRICES
        if current.quantized and not is_matrix and (to == "jaxseek" or name is not None):
            current = Form(BF16.name)
        if name is None:
            return current
        if name not in QUANTIZED:
            return Form(name)
        wanted = eight if name == "fp8" else QUANTIZED[name]
        return current if current.kind == wanted.kind or not is_matrix else wanted

    forms = {path: form(path) for path in source.table.params}
    for section in source.table.sections:
        for row in section:
            inputs = row.shapes[0][row.layout.order(0)[-1]]  # per head, where there are heads
            if forms[row.paths[0]].kind == "int4" and inputs % 2:
                raise CheckpointError(
                    f"int4 is stored in pairs of inputs, of which {row.name} has {inputs}"
                    f"{' a head' if inputs < row.layout.shape[1] else ''}; expected an even number. Choose "
                    "another dtype (--dtype int8)"
                )
    if to == "hf" and (wrong := {f.kind for f in forms.values()} & {"int8", "int4"}):
        raise CheckpointError(
            f"Hugging Face files of these models are not written as {wrong.pop()}; choose fp8, "
            "bfloat16, float16 or float32 (--dtype)"
        )
    return forms


def main_kind(source: stream.Described, forms: Mapping[str, Form]) -> str:
    """Return the storage kind that holds the most parameters."""
    count: Counter[str] = Counter()
    for path, form in forms.items():
        count[form.kind] += math.prod(source.table.params[path].shape)
    return count.most_common(1)[0][0]


def _plain_dtype(source: stream.Described, forms: Mapping[str, Form]) -> str:
    """Return the dtype for config.json: the most common one among parameters that are not quantised."""
    plain = {path: form for path, form in forms.items() if not form.quantized}
    return main_kind(source, plain)


def sink_for(source: stream.Described, forms: Mapping[str, Form], origin: Mapping[str, Any], to: str) -> Any:
    """Return the sink for the weights, and a function that writes all other files into a folder."""
    cfg = source.cfg.replace(dtype=_plain_dtype(source, forms)).to_hf()
    if to == "jaxseek":
        sink = StoreSink(source.table, forms)

        def finish(folder: Path, beside: Beside) -> None:
            write_metadata(folder, sink.arrays)
            models.write_json(folder / "config.json", cfg)
            beside.save(folder)

        return sink, finish
    cfg |= origin.get("config", {})
    rows = {name: row for name, row, _ in source.table}
    kept = origin["dtypes"]
    tensors = {n: Form(kept[n]) if n in kept else forms[rows[n].paths[0]] for n in source.tensors}
    sink = HFSink(source.table, tensors, kept)
    if any(form.quantized for form in forms.values()):
        default = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        }
        cfg["quantization_config"] = origin["quantization"] or default

    def finish(folder: Path, beside: Beside) -> None:
        sink.shards.write_index(folder)
        models.write_json(folder / "config.json", cfg)
        beside.save(folder)

    return sink, finish


def _write_manifest(
    draft: directory.Draft, source: Source, forms: Mapping[str, Form], origin: Mapping[str, Any]
) -> None:
    manifest = {
        "format": models.FORMAT,
        "layout": LAYOUT,
        **described(source.table, forms),
        "origin": dict(origin),
    }
    files = dict(sorted((file_sizes(draft.weights) | file_sizes(draft.files)).items()))
    manifest["files"] = {n: size for n, size in files.items() if n != models.MANIFEST and not _ours(n)}
    models.write_json(draft.files / models.MANIFEST, manifest)


def _ours(name: str) -> bool:
    """Return whether a file is of no checkpoint, or is written after what is noted of the others.

    A killed conversion may have left it.
    """
    return name.startswith(("journal", "sending/", digests.NAME))


def differing(
    folder: Place, spans: Any, digests: Mapping[str, Mapping[str, str]], threads: int, stage: Stage
) -> list[str]:
    """Return the names of tensors whose bytes on disk do not match `digests`."""
    done = stage("verify", sum(n for name in digests for *_, n in spans(name)))
    found = dict(stream.digest(folder, spans, digests, threads, done))
    return [name for name in digests if found[name] != digests[name]]


@dataclass
class Beside:
    """Files beside the weights, copied byte for byte: those of a tokenizer of any kind, and its settings."""

    folder: Place
    tokenizer: Tokenizer | None

    def save(self, path: Path) -> None:
        for name, data in tokenizer_files(self.folder).items():
            write_bytes(path / name, data)


@contextlib.contextmanager
def bars(show: bool, console: PlainConsole) -> Iterator[Stage]:
    """Show progress on the console: one bar per stage, in bytes."""
    columns = (TextColumn("{task.description:9}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not show) as shown:

        def stage(name: str, total: int) -> Callable[[int], None]:
            return functools.partial(shown.advance, shown.add_task(name, total=total))

        yield stage


@contextlib.contextmanager
def source_place(src: str | Place, dst: Place, weights: bool = True) -> Iterator[Place]:
    """Yield the place of the source checkpoint; without `weights`, hub weights are not downloaded.

    A GGUF file is first written as a temporary Hugging Face directory: beside `dst`, or in the system's
    temporary folder when `dst` is in an object store.
    """
    if not is_gguf(src):
        yield model_place(src, weights)
    elif isinstance(dst, Remote):
        with scratch("gguf") as folder:
            yield gguf_to_hf(src, folder / "hf")
    else:
        made = dst.with_name(f"{dst.name}.jaxseek-source{jax.process_index() or ''}")
        try:
            yield gguf_to_hf(src, made, overwrite=True)
        finally:
            remove(made)
