"""`jaxseek VERB`: find the verb's module, parse its arguments, run it.

A verb is a module of this folder, named in `VERBS`. Its docstring is its help: a paragraph, then examples.
`add(parser)` declares its arguments; `run(args)` returns its exit code, or None for 0, and imports what it
computes with, so that --help never imports JAX.

Two more names are optional. ALL_HOSTS runs the verb on every host of a slice instead of host 0 alone.
`uses_devices(args)` returns False for a command that does not touch the devices.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import select
import signal
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxseek
from jaxseek.cli.shared import WrongUse, say_unused_accelerator
from jaxseek.machine import hosts

VERBS = (
    *("quickstart", "convert", "quantize", "verify", "generate", "chat", "serve", "train", "info", "bench"),
    *("plan", "sweep", "placement", "doctor"),
)

_LONGEST = 2000  # characters of an error
_CALLBACKS = ("_xla_gc_callback", "__del__")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let an interrupt wait for a place where it can be raised.

    An extension that is interrupted while it is imported prints a traceback, and Python prints and drops what
    is raised in a callback of its garbage collector, of which JAX has a slow one.
    """

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        while frame is not None:
            code = frame.f_code
            if code.co_filename == "<frozen importlib._bootstrap>" or code.co_name in _CALLBACKS:
                again = threading.Timer(0.1, os.kill, (os.getpid(), number))
                again.daemon = True
                again.start()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ours &= threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@_interruptible()
def main(argv: list[str] | None = None) -> int:
    """Run a verb. Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong use.

    With JAXSEEK_TRACEBACK=1 an error is raised in place of the line.
    """
    _prepare_streams()
    verb, about, joined = "", "jaxseek: error:", None
    try:
        args = _parsed(sys.argv[1:] if argv is None else argv)
        verb, about = args.verb, f"jaxseek {args.verb}: error:"
        _set_up_jax()
        if verb != "doctor":  # doctor says more
            say_unused_accelerator()
        devices = not hasattr(args.module, "uses_devices") or args.module.uses_devices(args)
        if devices and getattr(args.module, "ALL_HOSTS", False):
            joined = hosts.join()
        elif verb != "doctor" and not hosts.runs_here(verb, devices):  # doctor runs on each host
            return 0
        if joined:
            about = f"{about} host {joined.index}:"
        with hosts.quiet(bool(joined and joined.index)):
            code = args.module.run(args) or 0
        sys.stdout.flush()  # here, where a full disk is an error like others
        return code
    except SystemExit:  # from argparse: --help, or wrong use
        _drop_unwritable()
        raise
    except KeyboardInterrupt:
        code, text = 1, "\ninterrupted"
    except WrongUse as e:
        code, text = 2, f"{about} {e}; see jaxseek {verb} --help"
    except BrokenPipeError as e:
        left = _drop_unwritable()  # a reader such as head has left, which is no error
        code, text = (0, "") if left else (1, f"{about} {_in_one_line(e)}")
    except BaseException as e:  # a panic of a library in Rust is no Exception
        code, text = 1, f"{about} {_in_one_line(e)}"
        if os.environ.get("JAXSEEK_TRACEBACK"):
            if not joined:
                raise
            text = f"{about} {traceback.format_exc()}"
    with contextlib.suppress(OSError):
        print(text, end="\n" if text else "", file=sys.stderr)
    _drop_unwritable()
    if joined:
        hosts.leave_failed(joined.index, code)
    return code


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, which knows every verb."""
    top = argparse.ArgumentParser(
        prog="jaxseek", description="The DeepSeek family in JAX: convert, generate, chat, inspect."
    )
    top.add_argument("--version", action="version", version=f"jaxseek {jaxseek.__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in VERBS:
        verb = importlib.import_module(f"jaxseek.cli.{name}")
        paragraph, _, example = (verb.__doc__ or "").partition("\n\n")
        description = " ".join(paragraph.split())
        p = verbs.add_parser(
            name,
            help=description,
            description=description,
            epilog=example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        p.set_defaults(module=verb)
        verb.add(p)
    return top


def _parsed(argv: list[str]) -> argparse.Namespace:
    top = parser()
    for argument in argv:  # argparse reads --name=-- as an empty list of values
        if argument.startswith("--") and argument.endswith("=--"):
            top.error(f"argument {argument[:-3]}: is '--', expected a value")
    return top.parse_args(argv)


def _in_one_line(e: BaseException) -> str:
    """Describe an error in one line, and say so if neither the user nor the machine can be its cause."""
    from jaxseek.machine.terminal import visible

    message = str(e)
    if type(e).__name__ == "JaxRuntimeError":
        message = message.partition("\n")[0]  # the rest lists every buffer
    text = visible(" ".join(message.split())) or type(e).__name__
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... ({len(text) - _LONGEST:,} characters more)"
    if isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and "RESOURCE_EXHAUSTED" in text):
        return f"out of memory: {text}; a smaller batch or context needs less"
    frames = [frame for frame, _ in traceback.walk_tb(e.__traceback__)]
    if any(frame.f_globals.get("__name__") == "jax._src.xla_bridge" for frame in frames):
        asked = os.environ.get("JAX_PLATFORMS") or "any backend"
        found = text if "Unable to initialize backend" in text else f"JAX cannot start on {asked} ({text})"
        return f"{found}; jaxseek doctor says more"
    if isinstance(e, ImportError):
        return f"{text}; jaxseek doctor checks what is installed"
    if isinstance(e, ValueError | OSError | RuntimeError) and not isinstance(e, RecursionError):
        return text
    return (
        f"{type(e).__name__}: {text} (a fault of jaxseek: JAXSEEK_TRACEBACK=1 shows where, please report it)"
    )


def _prepare_streams() -> None:
    """Make every print succeed, though streams may be closed or unable to encode the letters of a reply."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_unwritable() -> bool:
    """Redirect streams that cannot be written to the null device, or Python reports them when it ends.

    Returns whether one of them is a pipe without a reader.
    """
    left = False
    for stream in (sys.stdout, sys.stderr):
        try:
            left |= _reader_left(stream)
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return left


def _reader_left(stream: Any) -> bool:
    """Ask the system, since an unbuffered stream keeps nothing whose flush would fail again."""
    try:
        watch = select.poll()
        watch.register(stream.fileno(), select.POLLOUT)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in watch.poll(0))
    except OSError:  # in memory
        return False


def _set_up_jax() -> None:
    """Keep compiled programs between runs, unless the user has chosen a place or has no home."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if not cache.startswith("~"):
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(cache) / "jaxseek" / "xla")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
