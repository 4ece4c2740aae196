"""Checkpoints of a run: written in the background, whole or not at all, restored onto any mesh.

OUT/checkpoints/STEP/params    what training changes of the model, by dotted path
OUT/checkpoints/STEP/moments   the optimizer's state
OUT/checkpoints/STEP/run       optimizer steps, and the position in the data
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from jaxseek.checkpoint.directory import CheckpointError, orbax_writes, raise_one_host
from jaxseek.checkpoint.models import orbax_writers
from jaxseek.config.run import CheckpointConfig
from jaxseek.machine.hosts import most
from jaxseek.storage.place import Place, Remote, download, remove, temporary, upload, writable
from jaxseek.train.step import State, changed, with_values


class Checkpoints:
    """The checkpoints of one run. The newest `keep` stay, and the one with the lowest evaluation loss."""

    def __init__(self, out: str | Place, cfg: CheckpointConfig):
        self.directory = writable(out).absolute() / "checkpoints"
        self.cfg, self.saved_at = cfg, time.monotonic()
        raise_one_host(self.directory)
        self._copies = None if orbax_writes(self.directory) else _Copies(self.directory)
        self.manager = ocp.CheckpointManager(
            self._copies.local if self._copies else str(self.directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_NewestAndBest(cfg.keep),
                best_fn=_loss,  # without it metrics are not written
                best_mode="min",
                cleanup_tmp_directories=True,
            ),
            item_handlers={
                **{name: _arrays() for name in ("params", "moments")},
                "run": ocp.JsonCheckpointHandler(),
            },
        )

    def due(self, step: int) -> bool:
        """Whether this step is one to save after, by number or by time on any host."""
        late = time.monotonic() - self.saved_at > 60 * self.cfg.minutes
        return step % self.cfg.every == 0 or most(late) > 0

    def save(self, step: int, state: State, position: Any, loss: float | None = None) -> None:
        """Start writing; the state is copied before this returns. `loss` is that of an evaluation.

        Raises CheckpointError where the disk is full, or where the write before this one failed.
        """
        if step in self.manager.all_steps():
            return
        params = changed(state.model)
        needed = sum(a.nbytes for a in jax.tree.leaves((params, state.moments)))
        disk = self._copies.local if self._copies else self.directory
        free = shutil.disk_usage(disk).free if isinstance(disk, Path) else needed
        if most(free < needed):
            raise CheckpointError(
                f"{disk}: a checkpoint needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                f"free some and run again, it goes on from {self._last()}"
            )
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params),
            moments=ocp.args.PyTreeSave(state.moments),
            run=ocp.args.JsonSave({"updates": int(state.step), "positions": [position]}),
        )

        def write() -> None:
            if self._copies:
                self._copies.wait()
            self.manager.save(step, args=items, metrics={"loss": loss}, force=True)
            if self._copies:
                self._copies.send(self.manager.wait_until_finished)

        self._guarded(write)
        self.saved_at = time.monotonic()

    def wait(self) -> None:
        """Wait until everything is where it belongs. Raises CheckpointError where writing failed."""
        self._guarded(self._copies.wait if self._copies else self.manager.wait_until_finished)

    def close(self) -> None:
        """Wait, and end the threads that write."""
        self.wait()
        self.manager.close()
        if self._copies:
            self._copies.close()

    def steps(self) -> set[int]:
        """The steps that have a checkpoint, or will: the newest may be on its way."""
        written = {int(p.name) for p in self.directory.glob("*") if p.name.isdecimal()}
        return {*written, *self.manager.all_steps()}

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self.manager.latest_step()

    @property
    def best_loss(self) -> float:
        """The lowest evaluation loss among the checkpoints kept; infinite where there is none."""
        return min((_loss(self.manager.metrics(step)) for step in self.manager.all_steps()), default=math.inf)

    def restore(self, step: int, state: State) -> tuple[State, Any]:
        """The state of a checkpoint, on any number of hosts, and the position in the data.

        `state` may be abstract: it gives shapes, dtypes, and its model's mesh. Raises CheckpointError.
        """
        mesh = state.model.strategy.make_mesh()
        wanted = {"params": changed(state.model), "moments": state.moments}

        def restored(tree: Any) -> ocp.args.PyTreeRestore:
            leaves = jax.tree.map(
                lambda a: ocp.ArrayRestoreArgs(
                    sharding=NamedSharding(mesh, _spec(a)), global_shape=a.shape, dtype=a.dtype
                ),
                tree,
            )
            return ocp.args.PyTreeRestore(tree, restore_args=leaves)

        items = {name: restored(tree) for name, tree in wanted.items()}
        try:
            got = self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore(), **items))
        except (ValueError, KeyError, OSError) as e:
            raise CheckpointError(
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
        except Exception as e:  # writers raise many kinds
            full = "No space left" in str(e) or "ENOSPC" in str(e) or getattr(e, "errno", None) == 28
            why = "the disk is full" if full else f"{type(e).__name__}: {str(e)[:300]}"
            raise CheckpointError(
                f"{self.directory}: a checkpoint could not be written ({why}); once that is mended, run "
                f"again, it goes on from {self._last()}"
            ) from e

    def _last(self) -> str:
        with contextlib.suppress(Exception):  # of the write that failed
            self.manager.wait_until_finished()
        self.manager.reload()
        return "the start" if self.latest is None else f"step {self.latest}"


class _Copies:
    """Checkpoints in a store that Orbax does not write: made on a disk of this machine, sent when whole.

    The file that Orbax writes last in a step's folder is sent last and removed first.
    """

    def __init__(self, at: Place):
        assert isinstance(at, Remote)
        self.at, self._sending = at, None
        self._scratch = temporary("checkpoints")
        self.local = Path(self._scratch.name) / "checkpoints"
        self.local.mkdir()
        self._pool = ThreadPoolExecutor(1)
        for step in self._whole():
            download(at / step, self.local / step)

    def _whole(self) -> set[str]:
        """The steps that are there with all that belongs to them."""
        found = self.at.sizes() if self.at.is_dir() else {}
        return {step for step, _, rest in (name.partition("/") for name in found) if rest == _WHOLE}

    def send(self, until_written: Any) -> None:
        """Send in the background what is new, and remove what Orbax has removed here."""
        self._sending = self._pool.submit(self._send, until_written)

    def _send(self, until_written: Any) -> None:
        until_written()
        here = {path.name for path in self.local.iterdir() if (path / _WHOLE).is_file()}
        there = self._whole()
        for step in here - there:
            remove(self.at / step)  # what a kill has left of it
            upload(self.local / step, self.at / step, (_WHOLE,))
        for step in there - here:
            (self.at / step / _WHOLE).unlink(missing_ok=True)
            remove(self.at / step)

    def wait(self) -> None:
        """Wait until what was saved last is sent; raise what has gone wrong."""
        if self._sending is not None:
            sending, self._sending = self._sending, None
            sending.result()

    def close(self) -> None:
        self._pool.shutdown()
        self._scratch.cleanup()


_WHOLE = "_CHECKPOINT_METADATA"


def _arrays() -> Any:
    return ocp.PyTreeCheckpointHandler(type_handler_registry=orbax_writers())


@dataclass
class _NewestAndBest(PreservationPolicy):
    """Keeps the newest checkpoints, and the one with the lowest loss of those that have one."""

    newest: int

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        losses = [_loss(c.metrics) for c in checkpoints]
        best = losses.index(min(losses)) if any(map(math.isfinite, losses)) else -1
        return [i == best or i >= len(losses) - self.newest for i in range(len(losses))]


def _loss(metrics: Any) -> float:
    """The evaluation's; infinite where there was none."""
    loss = metrics and metrics["loss"]
    return math.inf if loss is None else float(loss)


def _spec(a: Any) -> jax.P:
    """How an array, real or abstract, is laid out; abstract scalars do not say."""
    return jax.P() if a.sharding is None else a.sharding.spec
