"""Write a smaller checkpoint (int8 by channel, int4 by groups of 128, FP8 by blocks of 128 x 128) and report
the cost of the rounding: perplexity and KL against SRC.

example:
  jaxseek quantize v2-lite/ v2-lite-int8/ --weights int8 --text sample.txt
"""

from __future__ import annotations

import argparse
import json

from jaxseek.cli.shared import add_conversion, write_checkpoint
from jaxseek.config.formats import FORMATS
from jaxseek.storage.place import place

ALL_HOSTS = True


def add(parser: argparse.ArgumentParser) -> None:
    add_conversion(parser)
    parser.add_argument("--weights", choices=FORMATS, required=True)
    parser.add_argument("--text", metavar="FILE", help="to measure on (default: Python's manual)")
    parser.add_argument("--no-report", action="store_true", help="do not load both models to compare them")


def run(args: argparse.Namespace) -> None:
    from jaxseek.machine.terminal import table

    if args.text:
        try:
            place(args.text).read_text(encoding="utf-8")  # to fail before the conversion, not after it
        except UnicodeError as e:
            raise ValueError(f"{args.text}: not a text file in UTF-8 ({e})") from None
    summary = write_checkpoint(args, dtype=args.weights)
    if not args.no_report:
        from jaxseek.recipes.quantize import rounding_error

        summary["error"] = error = rounding_error(args.src, args.dst, args.text)
        lines = {"error": f"not measured: {error.get('why')}"}
        if "kl" in error:
            lines = {
                "KL from the source": f"{error['kl']:.5f} nats a token (99 %: {error['kl_99']:.4f})",
                "same likeliest token": f"{error['same_token']:.2%} of {error['tokens']:,}, {error['text']}",
            }
        if "perplexity" in error:
            before, after = error["perplexity"], error["perplexity_quantized"]
            lines["perplexity"] = f"{before:.3f} before, {after:.3f} after"
        table(f"{args.dst}: {args.weights}", lines)
    if args.json:
        print(json.dumps(summary))
