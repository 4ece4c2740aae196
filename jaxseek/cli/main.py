"""`jaxseek VERB`: find the verb's module, parse its arguments, run it.

A verb is a module of this folder, named in `VERBS`. Its docstring is its help: a paragraph, then examples.
`add(parser)` declares its arguments; `run(args)` returns its exit code, or None for 0, and imports what it
computes with, so that --help never imports JAX.

Two more names are optional. ALL_HOSTS runs the verb on every host of a slice instead of host 0 alone.
`uses_devices(args)` returns False for a command that does not touch the devices.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from pathlib import Path

import jaxseek
from jaxseek.cli.shared import WrongUse, say_unused_accelerator

VERBS = (
    *("quickstart", "convert", "quantize", "verify", "generate", "chat", "train", "info", "bench"),
    *("plan", "sweep", "placement", "doctor"),
)


def main(argv: list[str] | None = None) -> int:
    """Run a verb. Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong use."""
    args = parser().parse_args(argv)
    _set_up_jax()
    from jaxseek.machine import hosts

    verb = args.module
    if args.verb != "doctor":  # which says more
        say_unused_accelerator()
    joined, about = None, f"jaxseek {args.verb}: error:"
    try:
        devices = not hasattr(verb, "uses_devices") or verb.uses_devices(args)
        if devices and getattr(verb, "ALL_HOSTS", False):
            joined = hosts.join()
        elif args.verb != "doctor" and not hosts.runs_here(args.verb, devices):  # which tells of each host
            return 0
        if joined:
            about = f"{about} host {joined.index}:"
        with hosts.quiet(bool(joined and joined.index)):
            return verb.run(args) or 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 1
    except WrongUse as e:
        print(f"{about} {e}; see jaxseek {args.verb} --help", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of our output has left: no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as e:
        text = _in_one_line(e)
        if text is None and not joined:
            raise
        print(f"{about} {text or traceback.format_exc()}", file=sys.stderr)
        code = 1
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


def _in_one_line(e: Exception) -> str | None:
    """Tell what was wrong; None for an error that is no fault of the user's or the machine's."""
    if os.environ.get("JAXSEEK_TRACEBACK"):
        return None
    if isinstance(e, RuntimeError) and "Unable to initialize backend" in str(e):
        return f"{e}; jaxseek doctor says more"
    return str(e) if isinstance(e, ValueError | OSError) else None


def _set_up_jax() -> None:
    """Keep compiled programs between runs, unless the user has chosen a place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxseek" / "xla"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
