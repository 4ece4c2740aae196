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
import sys
import traceback
from pathlib import Path

import jaxseek
from jaxseek.cli.shared import WrongUse, say_unused_accelerator
from jaxseek.machine import hosts

VERBS = (
    *("quickstart", "convert", "quantize", "verify", "generate", "chat", "train", "info", "bench"),
    *("plan", "sweep", "placement", "doctor"),
)


def main(argv: list[str] | None = None) -> int:
    """Run a verb. Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong use.

    With JAXSEEK_TRACEBACK=1 an error is raised in place of the line.
    """
    _prepare_streams()
    verb, about, joined = "", "jaxseek: error:", None
    try:
        args = parser().parse_args(argv)
        verb, about = args.verb, f"jaxseek {args.verb}: error:"
        _set_up_jax()
        if verb != "doctor":  # which says more
            say_unused_accelerator()
        devices = not hasattr(args.module, "uses_devices") or args.module.uses_devices(args)
        if devices and getattr(args.module, "ALL_HOSTS", False):
            joined = hosts.join()
        elif verb != "doctor" and not hosts.runs_here(verb, devices):  # which tells of each host
            return 0
        if joined:
            about = f"{about} host {joined.index}:"
        with hosts.quiet(bool(joined and joined.index)):
            code = args.module.run(args) or 0
        sys.stdout.flush()  # here, where an error is told like others
        return code
    except SystemExit:  # of --help and of arguments that cannot be parsed
        _drop_unwritable()
        raise
    except KeyboardInterrupt:
        code, text = 1, "\ninterrupted"
    except WrongUse as e:
        code, text = 2, f"{about} {e}; see jaxseek {verb} --help"
    except BrokenPipeError as e:
        left = _drop_unwritable()  # then it was the reader of our output: no error of ours
        code, text = (0, "") if left else (1, f"{about} {_in_one_line(e)}")
    except Exception as e:
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


def _in_one_line(e: Exception) -> str:
    """Describe an error; one that no user and no machine can be the cause of is told to be a fault."""
    from jaxseek.machine.terminal import visible

    message = str(e)
    if type(e).__name__ == "JaxRuntimeError":
        message = message.partition("\n")[0]  # others list every buffer
    text = visible(" ".join(message.split())) or type(e).__name__
    if isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and "RESOURCE_EXHAUSTED" in text):
        return f"out of memory: {text}; a smaller batch or context needs less"
    if isinstance(e, RuntimeError) and "Unable to initialize backend" in text:
        return f"{text}; jaxseek doctor says more"
    if isinstance(e, ImportError):
        return f"{text}; jaxseek doctor checks what is installed"
    if isinstance(e, ValueError | OSError | RuntimeError) and not isinstance(e, RecursionError):
        return text
    return (
        f"{type(e).__name__}: {text} (a fault of jaxseek: JAXSEEK_TRACEBACK=1 shows where, please report it)"
    )


def _prepare_streams() -> None:
    """Make every print succeed: streams may be closed, or of an encoding without the letters of a reply."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_unwritable() -> bool:
    """Point streams that cannot be written at nothing, so that the interpreter can end; return whether one of
    them has lost its reader."""
    left = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as e:
            left |= isinstance(e, BrokenPipeError)
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return left


def _set_up_jax() -> None:
    """Keep compiled programs between runs, unless the user has chosen a place or has no home."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if not cache.startswith("~"):
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(cache) / "jaxseek" / "xla")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
