"""Convert Hugging Face safetensors (or a GGUF file) to a sharded Orbax checkpoint, or back with --to hf.
Killed at any moment, the same command goes on.

example:
  jaxseek convert DeepSeek-R1/ r1/   &&   jaxseek convert r1/ back/ --to hf --dtype bf16
"""

from __future__ import annotations

import argparse
import json

from jaxseek.cli.shared import WrongUse, add_conversion, write_checkpoint
from jaxseek.config.formats import FORMATS

ALL_HOSTS = True


def add(parser: argparse.ArgumentParser) -> None:
    add_conversion(parser)
    parser.add_argument("--to", choices=("jaxseek", "hf"), default="jaxseek", help="format of DST")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "f16", "f32", *FORMATS, "bfloat16", "float16", "float32", "float8"),
        metavar="TYPE",
        help="bf16, f16, f32, or for the linear and expert matrices fp8, int8, int4 (default: as in SRC)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say where everything would go, by config.json and the index alone",
    )
    parser.add_argument(
        "--mesh", help="with --dry-run: the mesh whose bytes per chip to tell (tensor=4,fsdp=8)"
    )


def uses_devices(args: argparse.Namespace) -> bool:
    return not args.dry_run


def run(args: argparse.Namespace) -> None:
    if args.mesh and not args.dry_run:
        raise WrongUse("--mesh is for --dry-run: a checkpoint fits every mesh")
    if args.dry_run:
        _rehearse(args)
        return
    summary = write_checkpoint(args, to=args.to, dtype=args.dtype)
    if args.json:
        print(json.dumps(summary))


def _rehearse(args: argparse.Namespace) -> None:
    from jaxseek.machine.terminal import table
    from jaxseek_convert.dry_run import rehearse, summary

    plan = rehearse(args.src, args.dst, args.to, args.dtype, not args.no_mtp, args.mesh)
    for names, to, count, size in summary(plan):
        print(f"{count:>7,} x {names}  ->  {to}  {size / 1e9:,.3f} GB")
    time = "not estimated: only known between disks that can be written"
    if plan["seconds"]:
        low, high = (f"{s / 60:.0f} min" if s >= 120 else f"{s} s" for s in plan["seconds"])
        rates = {way: f"{rate / 1e9:.2f} GB/s" for way, rate in plan["bytes_per_second"].items()}
        time = f"{low} to {high}, as this machine reads {rates['read']} and writes {rates['write']}"
    chips = " x ".join(f"{a}={n}" for a, n in plan["mesh"].items()) or "one chip"
    table(
        f"{plan['tensors']:,} tensors, none missing, none left over",
        {
            "to read": f"{plan['bytes_read'] / 1e9:,.1f} GB",
            "to write": f"{plan['bytes_written'] / 1e9:,.1f} GB into {plan['files']:,} files, "
            + (f"{plan['disk_free'] / 1e9:,.1f} GB are free" if plan["disk_free"] is not None else "no disk"),
            "weights per chip": f"{plan['bytes_per_chip'] / 2**30:.2f} GiB on {chips}",
            "time": time,
        },
    )
    if args.json:
        print(json.dumps(plan))
