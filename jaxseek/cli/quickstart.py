"""Teach a tiny DeepSeek-V3 to think by GRPO, here and now: trained, measured, drawn, exported.

example:
  jaxseek quickstart --out runs/quickstart
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from jaxseek.cli.shared import number, say_unused_accelerator, whole


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="runs/quickstart", metavar="DIR", help="where it goes (and goes on from)"
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument(
        "--minutes", type=number(0, 1e6, above=True), default=5.0, help="at most this long (default 5)"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> None:
    import jax

    from jaxseek.machine.host_memory import keep_freed_memory
    from jaxseek.machine.terminal import visible
    from jaxseek.recipes.quickstart import quickstart

    keep_freed_memory()
    say_unused_accelerator(jax.default_backend())
    result = quickstart(args.out, args.seed, args.minutes)
    print(visible(str(result)))
    if args.json:
        print(json.dumps(dataclasses.asdict(result)))
