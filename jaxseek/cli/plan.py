"""Compile a step for a TPU slice, where there is no TPU, and report its cost: memory, time, the dearest
operations, every collective; of a GRPO step the memory at each of its points. Exit code 1 where it does not
fit.

example:
  jaxseek plan deepseek-v2-lite --topology v5e:2x4 --workload decode --batch 8 --context 2048
  jaxseek plan configs/runs/grpo-r1-qwen-1.5b.v5e-1.toml --topology v5e:1x1
"""

from __future__ import annotations

import argparse

from jaxseek.cli.shared import CONFIG, WrongUse, add_step, check_outputs, whole

ALL_HOSTS = True


def add(parser: argparse.ArgumentParser) -> None:
    add_step(parser, f"{CONFIG}; or a run file (RUN.toml), which says all that `jaxseek train` would do")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of a run file"
    )
    parser.add_argument(
        "--mesh",
        help="axis sizes (tensor=4,expert=2), a strategy TOML, or a shipped one's name (default: the shipped "
        "layout for this model, slice and workload, or else sizes chosen by a first estimate)",
    )
    parser.add_argument(
        "--batch", type=whole(), help="sequences (default 8; to train, as many as devices if these are more)"
    )
    parser.add_argument("--lora", type=whole(0), metavar="RANK", help="train and grpo: only adapters learn")
    parser.add_argument(
        "--remat",
        choices=("none", "dots", "costly", "full"),
        help="of training: what the backward pass computes again, as in a run file (default full)",
    )
    parser.add_argument("--hlo", metavar="FILE", help="write the compiled program's text")
    parser.add_argument(
        "--run",
        dest="repeats",
        nargs="?",
        type=whole(),
        const=10,
        default=0,
        metavar="N",
        help="on that slice: run the step N times too (default 10), and print the median beside the estimate",
    )
    parser.add_argument(
        "--trace", metavar="DIR", help="with --run: write a profile of a step there, for xprof"
    )


def uses_devices(args: argparse.Namespace) -> bool:
    return bool(args.repeats)


def run(args: argparse.Namespace) -> int:
    from jaxseek.config.run import is_run_file
    from jaxseek.lab.plan import plan

    if args.trace and not args.repeats:
        raise WrongUse("--trace is of a run: give --run too")
    if args.set and not is_run_file(args.model):
        raise WrongUse(f"--set changes a run file, and {args.model} is a model")
    check_outputs(args.plot, args.hlo, args.trace)
    layout = args.model, args.topology, args.mesh, args.workload, args.batch, args.context, args.weights
    run = {"lora": args.lora, "remat": args.remat, "repeats": args.repeats, "trace": args.trace}
    return plan(*layout, overrides=args.set, as_json=args.json, hlo=args.hlo, plot=args.plot, **run)
