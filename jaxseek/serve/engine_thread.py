"""The engine in a thread of its own: jobs come in, what is new of each answer goes out."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxseek.engine.engine import Engine
from jaxseek.engine.request import Handle, Request
from jaxseek.serve.figures import Figures

log = logging.getLogger("jaxseek")


@dataclass(frozen=True)
class Update:
    """News of an answer: its text and tokens since the update before, with what is told of each.

    The last update has a finish reason, or an error with the HTTP status that says whose fault it is.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top: tuple[list[tuple[int, float]], ...] = ()
    prompt: tuple[tuple[float, int, float], ...] = ()  # with the first
    finish_reason: str | None = None
    error: str | None = None
    status: int = 400

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """A request in the worker; `notify` is called in its thread with every Update."""

    request: Request
    notify: Callable[[Update], None]
    begun: float = field(default_factory=time.perf_counter)
    handle: Handle | None = None
    told: int = 0  # tokens


class Worker:
    """Runs one engine. `submit` and `cancel` may be called from any thread."""

    def __init__(self, engine: Engine, figures: Figures):
        self.engine, self.figures = engine, figures
        self._inbox: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: dict[Handle, Job] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job in line; all that comes of it goes to its `notify`."""
        self._inbox.put(("submit", job))

    def cancel(self, job: Job) -> None:
        """End a job, if it has not ended."""
        self._inbox.put(("cancel", job))

    def close(self) -> None:
        """End all jobs and the thread."""
        self._inbox.put(("close", None))
        self._thread.join()

    @property
    def alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while self._take():
            if not self.engine.busy:
                continue
            try:
                for handle in self.engine.step():
                    self._tell(self._jobs[handle])
            except Exception as error:  # of all requests under way; the engine can go on with others
                log.exception("a step of the engine failed")
                for handle, job in self._jobs.items():
                    self.engine.cancel(handle)
                    self.figures.ended(job, "error")
                    job.notify(Update(error=f"the engine failed: {type(error).__name__}", status=500))
                self._jobs.clear()
            self.figures.load(self.engine.scheduler.live, self.engine.scheduler.waiting)

    def _take(self) -> bool:
        """Do what others asked for, waiting for it where there is nothing else to do. False at the end."""
        wait = not self.engine.busy
        while True:
            try:
                what, job = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if job is None:
                for handle in list(self._jobs):
                    self.engine.cancel(handle)
                return False
            if what == "cancel":
                if job.handle is not None and self._jobs.pop(job.handle, None):
                    self.engine.cancel(job.handle)
                    self.figures.ended(job, "cancelled")
                continue
            try:
                job.handle = self.engine.submit(job.request)
                self._jobs[job.handle] = job
            except ValueError as error:
                job.notify(Update(error=str(error)))

    def _tell(self, job: Job) -> None:
        assert job.handle is not None
        answer, start = job.handle.answer, job.told
        job.told = len(answer.tokens)
        if job.told == start and not job.handle.ended:
            return
        self.figures.tokens(job, first=start == 0, count=job.told - start)
        update = Update(
            job.handle.piece(),
            tokens=tuple(answer.tokens[start:]),
            logprobs=tuple(answer.logprobs[start:]),
            top=tuple(answer.top[start:]),
            prompt=() if start else tuple(answer.prompt),
            finish_reason=answer.finish_reason,
        )
        if update.last:
            del self._jobs[job.handle]
            self.figures.ended(job, answer.finish_reason or "")
        job.notify(update)
