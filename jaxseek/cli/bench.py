"""Time prefill and decode here, as a fraction of the machine's memory bandwidth; with --train the speed and
memory of training steps, as a fraction of its FLOPs; with --grpo GRPO steps; with --convert conversions
beside cat; with --serve a server at several loads.

example:
  jaxseek bench tiny-v3 --batch 1 8 --against transformers
  jaxseek bench tiny-v3 --train --rows 4 --length 256 --against transformers
  jaxseek bench tiny-v3 --grpo --against trl
  jaxseek bench --convert --gigabytes 4.8 --against transformers
  jaxseek bench --serve http://localhost:8000 --clients 1 8 32
"""

from __future__ import annotations

import argparse
import os

from jaxseek.cli.shared import WrongUse, add_model, number, whole


def add(parser: argparse.ArgumentParser) -> None:
    add_model(parser, optional=True)
    parser.add_argument("--batch", type=whole(), nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=whole(), default=64)
    parser.add_argument("--new-tokens", type=whole(2), default=64)
    parser.add_argument("--train", action="store_true", help="time training steps, not generation")
    parser.add_argument(
        "--grpo", action="store_true", help="time GRPO steps: 8 prompts x 8 answers, 64 + 64 tokens"
    )
    parser.add_argument(
        "--convert", action="store_true", help="time converting a synthetic checkpoint; without MODEL"
    )
    parser.add_argument(
        "--serve", metavar="URL", help="load a server with OpenAI's interface; MODEL is its name there"
    )
    parser.add_argument(
        "--clients", type=whole(1, 4096), nargs="+", default=[1, 8, 32], help="with --serve: at a time"
    )
    parser.add_argument(
        "--seconds", type=number(above=True), default=30.0, help="with --serve: of each number of clients"
    )
    parser.add_argument("--rows", type=whole(), default=4, help="with --train: sequences of a step")
    parser.add_argument("--length", type=whole(), default=256, help="with --train: tokens of a sequence")
    parser.add_argument(
        "--gigabytes", type=number(above=True), default=4.8, help="with --convert: size of the checkpoint"
    )
    parser.add_argument("--shards", type=whole(), default=16, help="with --convert: its files, about")
    parser.add_argument(
        "--dir", default=".", help="with --convert: on the disk to be measured; twice the size is needed"
    )
    parser.add_argument(
        "--remat",
        nargs="+",
        choices=("none", "dots", "costly", "full"),
        default=["none"],
        help="with --train: what the backward pass computes again instead of keeping it; each is timed",
    )
    parser.add_argument("--repeats", type=whole(), default=5, help="interleaved runs; the median is reported")
    parser.add_argument(
        "--against", choices=("transformers", "trl"), help="time this too (needs the parity extra)"
    )
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> None:
    common = {name: getattr(args, name) for name in ("mesh", "dtype", "repeats", "against")}
    common["as_json"] = args.json
    if args.convert:
        if args.model or args.against == "trl":
            raise WrongUse("--convert makes a checkpoint, and compares with transformers: leave the rest out")
        from jaxseek.bench.convert import bench_convert

        size = args.gigabytes, args.shards
        bench_convert(*size, args.dtype, args.repeats, args.against, args.dir, args.json)
        return
    if args.serve:
        if args.against:
            raise WrongUse("--serve loads one server: run it once for each")
        from jaxseek.bench.serve import bench_serve

        sizes = args.prompt_tokens, args.new_tokens
        key = os.environ.get("JAXSEEK_API_KEY")
        bench_serve(args.serve, args.clients, args.seconds, *sizes, args.model, key, args.json)
        return
    if not args.model:
        raise WrongUse("no model: give MODEL, --convert or --serve")
    if args.grpo:
        if args.against not in (None, "trl"):
            raise WrongUse(f"--grpo compares with trl, not {args.against}")
        from jaxseek.bench.grpo import bench_grpo

        bench_grpo(args.model, 8, 8, 64, args.repeats, args.against, args.json)
        return
    if args.against == "trl":
        raise WrongUse("trl is what --grpo compares with")
    if args.train:
        from jaxseek.bench.train import bench_train

        bench_train(args.model, rows=args.rows, length=args.length, remat=args.remat, **common)
        return
    from jaxseek.bench.generate import bench

    sizes = {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
    bench(args.model, batches=args.batch, **sizes, **common)
