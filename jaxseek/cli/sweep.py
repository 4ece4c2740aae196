"""Compare layouts of a step on a TPU slice: the shipped rule tables with all sizes, pruned by a first
estimate, compiled as `plan` does. Started again, it goes on where it was.

example:
  jaxseek sweep deepseek-v2-lite --topology v5e:2x4 --batch 8 64 --plot sweep.png
"""

from __future__ import annotations

import argparse

from jaxseek.cli.shared import CONFIG, add_step, check_outputs, whole


def add(parser: argparse.ArgumentParser) -> None:
    add_step(parser, CONFIG)
    parser.set_defaults(workload="decode", context=2048, weights="bf16")
    parser.add_argument(
        "--mesh", nargs="+", default=[], help="compare these instead, each as `plan` takes it"
    )
    parser.add_argument(
        "--batch", type=whole(), nargs="+", default=[8], help="sequences; several are compared"
    )
    parser.add_argument(
        "--keep", type=whole(), default=8, metavar="N", help="layouts to compile for each batch"
    )


def uses_devices(args: argparse.Namespace) -> bool:
    return False


def run(args: argparse.Namespace) -> int:
    from jaxseek.lab.sweep import sweep

    check_outputs(args.plot)
    layouts = args.model, args.topology, args.mesh, args.workload, args.batch, args.context, args.weights
    return sweep(*layouts, keep=args.keep, as_json=args.json, plot=args.plot)
