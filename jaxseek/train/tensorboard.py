"""TensorBoard's event files, written in the caller's thread.

tensorboardX's SummaryWriter writes in a thread of its own. An error such as a full disk ends that thread, and
the caller then waits for ever at its full queue.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Any, cast

from jaxseek.storage.place import Mirror, Place


class TensorBoard:
    """Scalars by step; what an earlier run has for `first_step` and later is not shown. Raises OSError."""

    def __init__(self, directory: Place, first_step: int = 0, seconds: float = 10.0):
        from tensorboardX.event_file_writer import EventsWriter  # a second to import
        from tensorboardX.proto import event_pb2, summary_pb2

        self._events, self._summaries = cast(Any, event_pb2), cast(Any, summary_pb2)
        self.seconds, self._written = seconds, time.monotonic()
        self._folder = Mirror(directory)
        self._folder.local.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(self._folder.local / "events"), f".{os.getpid()}.{first_step}")
        self._add(first_step, session_log=self._events.SessionLog(status=self._events.SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append numbers; they are on the disk within `seconds` or at the next call after that."""
        value = self._summaries.Summary.Value
        scalars = [value(tag=name, simple_value=number) for name, number in values.items()]
        self._add(step, summary=self._summaries.Summary(value=scalars))
        if time.monotonic() - self._written > self.seconds:
            self._file.flush()
            self._folder.send()
            self._written = time.monotonic()

    def _add(self, step: int, **what: Any) -> None:
        self._file.write_event(self._events.Event(wall_time=time.time(), step=step, **what))

    def close(self) -> None:
        with contextlib.ExitStack() as closing:
            closing.callback(self._folder.close)
            self._file.close()
