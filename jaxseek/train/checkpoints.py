"""Checkpoints of a run: written in the background, whole or not at all, restored onto any mesh.

OUT/checkpoints/STEP/params    the parameters that training changes, by dotted path
OUT/checkpoints/STEP/moments   the optimizer's state
OUT/checkpoints/STEP/run       the number of updates, and the recipe's position
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
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(cfg.keep),
            best_fn=_loss,  # without it metrics are not written
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        handlers: dict[str, Any] = {
            name: ocp.PyTreeCheckpointHandler(type_handler_registry=orbax_writers())
            for name in ("params", "moments")
        }
        handlers["run"] = ocp.JsonCheckpointHandler()
        path = self._copies.local if self._copies else str(self.directory)
        self.manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)

    def due(self, step: int) -> bool:
        """Tell whether to save after this step, by its number or by the time on any host."""
        late = time.monotonic() - self.saved_at > 60 * self.cfg.minutes
        return step % self.cfg.every == 0 or most(late) > 0

    def save(self, step: int, state: State, position: Any, loss: float | None = None) -> None:
        """Start writing a copy of the state. `loss` is that of an evaluation.

        Raises CheckpointError if the disk is full or the write before this one failed.
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
        """Wait until everything is written and sent. Raises CheckpointError if that failed."""
        self._guarded(self._copies.wait if self._copies else self.manager.wait_until_finished)

    def close(self) -> None:
        """Wait, and end the writing threads."""
        self.wait()
        self.manager.close()
        if self._copies:
            self._copies.close()

    def steps(self) -> set[int]:
        """Steps that have a checkpoint, or will: the newest may still be written."""
        written = {int(p.name) for p in self.directory.glob("*") if p.name.isdecimal()}
        return {*written, *self.manager.all_steps()}

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self.manager.latest_step()

    @property
    def best_loss(self) -> float:
        """Lowest evaluation loss among the checkpoints kept; infinite without one."""
        return min((_loss(self.manager.metrics(step)) for step in self.manager.all_steps()), default=math.inf)

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
        except Exception as e:  # writers raise exceptions of many kinds
            full = "No space left" in str(e) or "ENOSPC" in str(e) or getattr(e, "errno", None) == 28
            why = "the disk is full" if full else f"{type(e).__name__}: {str(e)[:300]}"
            raise CheckpointError(
                f"{self.directory}: a checkpoint could not be written ({why}); once that is mended, run "
                f"again, it goes on from {self._last()}"
            ) from e

    def _last(self) -> str:
        with contextlib.suppress(Exception):  # that of the failed write
            self.manager.wait_until_finished()
        self.manager.reload()
        return "the start" if self.latest is None else f"step {self.latest}"


class _Copies:
    """Copies in a store that Orbax cannot write: checkpoints are made on a local disk and sent when whole.

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
        """Steps whose folder in the store is complete."""
        found = self.at.sizes() if self.at.is_dir() else {}
        return {step for step, _, rest in (name.partition("/") for name in found) if rest == _WHOLE}

    def send(self, until_written: Any) -> None:
        """Send new checkpoints in the background, and remove those that Orbax has removed here."""
        self._sending = self._pool.submit(self._send, until_written)

    def _send(self, until_written: Any) -> None:
        until_written()
        here = {path.name for path in self.local.iterdir() if (path / _WHOLE).is_file()}
        there = self._whole()
        for step in here - there:
            remove(self.at / step)  # the rest of an upload that was killed
            upload(self.local / step, self.at / step, (_WHOLE,))
        for step in there - here:
            (self.at / step / _WHOLE).unlink(missing_ok=True)
            remove(self.at / step)

    def wait(self) -> None:
        """Wait until the last checkpoint is sent, and raise its exception if sending failed."""
        if self._sending is not None:
            sending, self._sending = self._sending, None
            sending.result()

    def close(self) -> None:
        self._pool.shutdown()
        self._scratch.cleanup()


_WHOLE = "_CHECKPOINT_METADATA"


@dataclass
class _NewestAndBest(PreservationPolicy):
    """Keeps the newest checkpoints and the one with the lowest evaluation loss."""

    newest: int

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        losses = [_loss(c.metrics) for c in checkpoints]
        best = losses.index(min(losses)) if any(map(math.isfinite, losses)) else -1
        return [i == best or i >= len(losses) - self.newest for i in range(len(losses))]


def _loss(metrics: Any) -> float:
    """Evaluation loss among a checkpoint's metrics; infinite without an evaluation."""
    loss = metrics and metrics["loss"]
    return math.inf if loss is None else float(loss)
