"""Time prefill and decode here, as a fraction of the machine's memory bandwidth; with --train the speed and
memory of training steps, as a fraction of its FLOPs; with --grpo GRPO steps.

example:
  jaxseek bench tiny-v3 --batch 1 8 --against transformers
  jaxseek bench tiny-v3 --train --rows 4 --length 256 --against transformers
  jaxseek bench tiny-v3 --grpo --against trl
"""

from __future__ import annotations

import argparse

from jaxseek.cli.shared import WrongUse, add_model, whole


def add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--batch", type=whole(), nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=whole(), default=64)
    parser.add_argument("--new-tokens", type=whole(2), default=64)
    parser.add_argument("--train", action="store_true", help="time training steps, not generation")
    parser.add_argument(
        "--grpo", action="store_true", help="time GRPO steps: 8 prompts x 8 answers, 64 + 64 tokens"
    )
    parser.add_argument("--rows", type=whole(), default=4, help="with --train: sequences of a step")
    parser.add_argument("--length", type=whole(), default=256, help="with --train: tokens of a sequence")
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
