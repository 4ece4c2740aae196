"""Run pretraining, SFT, DPO, distillation, GRPO or a pipeline of them by a run file; the same command goes
on with a stopped run.

example:
  jaxseek train pretrain-tiny --set steps=100 --set out=runs/mine
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from jaxseek.cli.shared import WrongUse, say_unused_accelerator

ALL_HOSTS = True


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_file", nargs="?", metavar="RUN.toml", help="run file, or the name of a shipped one"
    )
    parser.add_argument("--list", action="store_true", help="name every shipped run file and what it trains")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key (data.length=512)"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def uses_devices(args: argparse.Namespace) -> bool:
    return not args.list


def run(args: argparse.Namespace) -> int:
    if args.list:
        from jaxseek.config.run import headline, shipped_runs

        runs = {name: headline(path) for name, path in shipped_runs().items()}
        print(json.dumps(runs) if args.json else "\n".join(f"{n:22} {text}" for n, text in runs.items()))
        return 0
    if not args.run_file:
        raise WrongUse("no run file: give RUN.toml, or --list for the shipped ones")
    import jax

    from jaxseek.config.run import RunConfig, read_toml
    from jaxseek.machine.host_memory import keep_freed_memory

    stages = "stages" in read_toml(args.run_file, args.set)
    settings = None if stages else RunConfig.from_toml(args.run_file, args.set)
    keep_freed_memory()
    say_unused_accelerator(jax.default_backend())
    from jaxseek.recipes.pipeline import Pipeline, run_pipeline, run_stage

    if settings is None:
        result = run_pipeline(Pipeline.from_toml(args.run_file, args.set))
    else:
        result = run_stage(settings)
    if args.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print(result)
    return 1 if result.stopped else 0
