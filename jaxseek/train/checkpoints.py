"""Checkpoints of a run: written in the background, whole or not at all, restored onto any mesh.

OUT/checkpoints/STEP/params    the parameters that training changes, by dotted path
OUT/checkpoints/STEP/moments   the optimizer's state
OUT/checkpoints/STEP/run       the number of updates, and the recipe's position
OUT/checkpoints/STEP/digests*  digests of these files, by every host of those that it wrote
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import shutil
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from jaxseek.checkpoint import digests
from jaxseek.checkpoint.digests import Digests
from jaxseek.checkpoint.directory import CheckpointError, is_full, orbax_writes, raise_one_host
from jaxseek.checkpoint.models import orbax_writers
from jaxseek.config.run import CheckpointConfig
from jaxseek.machine.hosts import most
from jaxseek.storage.place import Place, Remote, download, file_sizes, remove, temporary, upload, writable
from jaxseek.storage.untrusted import parse_json
from jaxseek.train.step import State, changed, with_values

log = logging.getLogger("jaxseek")
# Orbax logs, with their tracebacks, errors that it raises too
logging.getLogger("absl").addFilter(lambda record: not record.exc_info)


class UnreadableError(CheckpointError):
    """A checkpoint that cannot be restored."""


class Checkpoints:
    """The checkpoints of one run. The newest `keep` stay, and the one with the lowest evaluation loss.

    Damaged ones are passed over. They are deleted as others are, when a newer checkpoint is whole.
    """

    def __init__(self, out: str | Place, cfg: CheckpointConfig):
        self.directory = writable(out).absolute() / "checkpoints"
        self.cfg, self.saved_at = cfg, time.monotonic()
        raise_one_host(self.directory)
        self._copies = None if orbax_writes(self.directory) else _Copies(self.directory)
        self._folder = self._copies.local if self._copies else self.directory
        self._losses: dict[int, float] = {}  # of evaluations, by step
        self._damaged: dict[int, str] = {}  # what is wrong, by step
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(cfg.keep, self._losses, self._damaged),
            best_fn=bool,  # never called, but without it metrics are not written
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # or damaged metrics would end the run here
        )
        handlers: dict[str, Any] = {
            name: ocp.PyTreeCheckpointHandler(type_handler_registry=orbax_writers())
            for name in ("params", "moments")
        }
        handlers["run"] = ocp.JsonCheckpointHandler()
        self.manager = ocp.CheckpointManager(str(self._folder), options=options, item_handlers=handlers)
        self._losses |= {step: self._stored_loss(step) for step in self.manager.all_steps()}
        self._pool = ThreadPoolExecutor(1)
        self._completing: Future[None] | None = None  # the last save

    def due(self, step: int) -> bool:
        """Tell whether to save after this step, by its number or by the time on any host."""
        late = time.monotonic() - self.saved_at > 60 * self.cfg.minutes
        return step % self.cfg.every == 0 or most(late) > 0

    def save(self, step: int, state: State, position: Any, loss: float | None = None) -> None:
        """Start writing a copy of the state. `loss` is that of an evaluation.

        Raises CheckpointError if the disk is full or the write before this one failed.
        """
        if step in self.manager.all_steps() and step not in self._damaged:
            return
        params = changed(state.model)
        needed = sum(a.nbytes for a in jax.tree.leaves((params, state.moments)))
        free = shutil.disk_usage(self._folder).free if isinstance(self._folder, Path) else needed
        if most(free < needed):
            raise CheckpointError(
                f"{self._folder}: a checkpoint needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                f"free some and run again, it goes on from {self._last()}"
            )
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params),
            moments=ocp.args.PyTreeSave(state.moments),
            run=ocp.args.JsonSave({"updates": int(state.step), "positions": [position]}),
        )

        def write() -> None:
            self._completed()
            if self._damaged.pop(step, None):
                self.manager.delete(step)
                if self._copies:
                    self._copies.forget(step)
            self._losses[step] = math.inf if loss is None else loss
            self.manager.save(step, args=items, metrics={"loss": loss}, force=True)
            self._completing = self._pool.submit(self._complete, step)

        self._guarded(write)
        self.saved_at = time.monotonic()

    def _complete(self, step: int) -> None:
        """Note the digests of what this host wrote once a save has its name, and send it."""
        self.manager.wait_until_finished()
        folder, host = self._folder / str(step), jax.process_index()
        names = [name for name in file_sizes(folder) if _host_of(name) == host]
        digests.write(folder, digests.note(folder, names), host)
        if self._copies:
            self._copies.send()

    def _completed(self) -> None:
        completing, self._completing = self._completing, None
        if completing is not None:
            completing.result()

    def wait(self) -> None:
        """Wait until everything is written and sent. Raises CheckpointError if that failed."""
        self._guarded(self._completed)

    def close(self) -> None:
        """Wait, and end the writing threads."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
        self.manager.close()
        if self._copies:
            self._copies.close()

    def steps(self) -> set[int]:
        """Steps that have a checkpoint, or will: the newest may still be written."""
        written = {int(p.name) for p in self.directory.glob("*") if p.name.isdecimal()}
        return {*written, *self.manager.all_steps()}

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint that is not known to be damaged."""
        return max((step for step in self.manager.all_steps() if step not in self._damaged), default=None)

    def newest_whole(self) -> int | None:
        """Return the step of the newest checkpoint that its digests show to be whole, None without any.

        A line names the damaged ones. Every host calls this. Raises CheckpointError if all are damaged.
        """
        while (step := self.latest) is not None and (wrong := self._damage(step)):
            self._damaged[step] = wrong
        told = "; ".join(f"step {s}: {wrong}" for s, wrong in sorted(self._damaged.items(), reverse=True))
        if told and step is None:
            raise CheckpointError(
                f"{self.directory}: every checkpoint is damaged ({told}); put back a copy of one, or start "
                "the run anew in another out"
            )
        if told and jax.process_index() == 0:
            log.warning("%s: damaged (%s); going on from step %d instead", self.directory, told, step)
        return step

    def before(self, step: int, error: UnreadableError) -> int | None:
        """Return the newest whole checkpoint before one that could not be restored, as newest_whole does.

        Raises the error if that one has digests: then it is whole, and does not fit the run.
        """
        if self._digests(step).files:
            raise error
        self._damaged[step] = str(error.__cause__)[:300]
        return self.newest_whole()

    def _digests(self, step: int) -> Digests:
        return Digests.of(self._folder / str(step))

    def _damage(self, step: int) -> str:
        """Say what is wrong with a checkpoint, "" for a whole one."""
        try:
            bad = self._digests(step).damaged_files()
        except CheckpointError as e:
            return str(e)
        more = f" and {len(bad) - 1} other files" if len(bad) > 1 else ""
        return f"{bad[0]}{more} not as written" if bad else ""

    @property
    def best_loss(self) -> float:
        """Lowest evaluation loss among the checkpoints kept; infinite without one."""
        whole = set(self.manager.all_steps()) - self._damaged.keys()
        return min((self._losses[step] for step in whole), default=math.inf)

    def _stored_loss(self, step: int) -> float:
        """Read the evaluation loss of a checkpoint; infinite without one, and where the file is damaged."""
        folder, name = self._folder / str(step), "metrics/metrics"
        with contextlib.suppress(CheckpointError, OSError, ValueError, KeyError, TypeError):
            raw = (folder / name).read_bytes()
            Digests.noted(folder).check_file(name, np.frombuffer(raw, np.uint8))
            loss = parse_json(raw, name)["loss"]
            return math.inf if loss is None else float(loss)
        return math.inf

    def restore(self, step: int, state: State) -> tuple[State, Any]:
        """Read the state of a checkpoint, on any number of hosts, and the recipe's position.

        `state` may be abstract: it gives shapes, dtypes, and its model's mesh. Raises CheckpointError.
        """
        mesh = state.model.strategy.make_mesh()

        def leaf(a: Any) -> ocp.ArrayRestoreArgs:
            spec = jax.P() if a.sharding is None else a.sharding.spec  # abstract scalars have none
            sharding = NamedSharding(mesh, spec)
            return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=a.shape, dtype=a.dtype)

        wanted = {"params": changed(state.model), "moments": state.moments}
        items: dict[str, Any] = {
            name: ocp.args.PyTreeRestore(tree, restore_args=jax.tree.map(leaf, tree))
            for name, tree in wanted.items()
        }
        try:
            got = self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore(), **items))
        except (ValueError, KeyError, TypeError, OSError) as e:
            raise UnreadableError(
                f"{self.directory / str(step)}: cannot be restored ({type(e).__name__}: {str(e)[:300]}); "
                "remove it to go on from the one before"
            ) from e
        positions = got["run"]["positions"]
        if len(positions) != 1:  # by a jaxseek whose hosts read different examples
            raise CheckpointError(
                f"{self.directory / str(step)}: was written by an older jaxseek on {len(positions)} hosts, "
                "each with its own place in the data, expected one place for all. Go on with that version "
                f"on {len(positions)} hosts, or start a new run from a model that it exported"
            )
        counter = jax.device_put(np.int32(got["run"]["updates"]), NamedSharding(mesh, jax.P()))
        model = with_values(state.model, got["params"])
        return State(model, got["moments"], counter), positions[0]

    def _guarded(self, act: Any) -> None:
        try:
            act()
        except Exception as e:  # writers raise exceptions of many kinds
            why = "the disk is full" if is_full(e) else f"{type(e).__name__}: {str(e)[:300]}"
            raise CheckpointError(
                f"{self.directory}: a checkpoint could not be written ({why}); once that is mended, run "
                f"again, it goes on from {self._last()}"
            ) from e

    def _last(self) -> str:
        with contextlib.suppress(Exception):  # that of the failed write
            self.manager.wait_until_finished()
        with contextlib.suppress(Exception):  # of a damaged checkpoint
            self.manager.reload()
        return "the start" if self.latest is None else f"step {self.latest}"


class _Copies:
    """Copies in a store that Orbax cannot write: checkpoints are made on a local disk and sent when whole.

    The file that Orbax writes last in a step's folder is sent last and removed first.
    """

    def __init__(self, at: Place):
        assert isinstance(at, Remote)
        self.at = at
        self._scratch = temporary("checkpoints")
        self.local = Path(self._scratch.name) / "checkpoints"
        self.local.mkdir()
        for step in self._whole():
            download(at / step, self.local / step)

    def _whole(self) -> set[str]:
        """Steps whose folder in the store is complete."""
        found = self.at.sizes() if self.at.is_dir() else {}
        return {step for step, _, rest in (name.partition("/") for name in found) if rest == _WHOLE}

    def send(self) -> None:
        """Send new checkpoints, and remove those that Orbax has removed here."""
        here = {path.name for path in self.local.iterdir() if (path / _WHOLE).is_file()}
        there = self._whole()
        for step in here - there:
            remove(self.at / step)  # the rest of an upload that was killed
            upload(self.local / step, self.at / step, (_WHOLE,))
        for step in there - here:
            self.forget(step)

    def forget(self, step: str | int) -> None:
        """Remove a checkpoint from the store."""
        (self.at / str(step) / _WHOLE).unlink(missing_ok=True)
        remove(self.at / str(step))

    def close(self) -> None:
        self._scratch.cleanup()


_WHOLE = "_CHECKPOINT_METADATA"


_PROCESS = re.compile(r"(?:.*/)?ocdbt\.process_(\d+)/.*")  # what a host wrote of the arrays


def _host_of(name: str) -> int:
    """Return the host that notes the digest of a file: the one that wrote it."""
    found = _PROCESS.fullmatch(name)
    return int(found[1]) if found else 0


@dataclass
class _NewestAndBest(PreservationPolicy):
    """Keeps the newest checkpoints and the one with the lowest evaluation loss, of those that are whole."""

    newest: int
    losses: Mapping[int, float]
    damaged: Collection[int]

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        whole = [c.step for c in checkpoints if c.step not in self.damaged]
        best = min(whole, key=lambda step: self.losses[step])
        kept = {*whole[-self.newest :], *([best] if math.isfinite(self.losses[best]) else [])}
        return [c.step in kept for c in checkpoints]
