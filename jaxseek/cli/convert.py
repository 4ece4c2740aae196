"""The verbs that make checkpoints of checkpoints: convert, quantize, verify."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from typing import Any

from jaxseek.cli.shared import WrongUse
from jaxseek.machine.terminal import table
from jaxseek.storage.place import place


def add_conversion_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Declare them; `verb` makes a parser of a name, what runs it, its description and an example."""
    p = verb(
        "convert",
        _convert,
        "Hugging Face safetensors (or a GGUF file) to a sharded Orbax checkpoint, or back with --to hf. "
        "Killed at any moment, the same command goes on.",
        "jaxseek convert DeepSeek-R1/ r1/   &&   jaxseek convert r1/ back/ --to hf --dtype bf16",
    )

    def conversion_arguments(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "src",
            help="Hugging Face directory, hf://OWNER/NAME, fsspec URL, jaxseek checkpoint, .gguf file or "
            "package:NAME of one",
        )
        p.add_argument("dst", help="directory to write; must not exist")
        p.add_argument("--no-mtp", action="store_true", help="leave the multi-token module out")
        p.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
        p.add_argument(
            "--memory", type=_size, default="1.5GiB", help="what the process may take (default 1.5GiB)"
        )
        p.add_argument("--verify", action="store_true", help="read everything back before DST gets its name")
        p.add_argument(
            "--no-checksum", action="store_true", help="do not check SRC's files by the hub's SHA-256"
        )
        p.add_argument("--json", action="store_true", help="end with one line of JSON")

    conversion_arguments(p)
    p.add_argument("--to", choices=("jaxseek", "hf"), default="jaxseek", help="format of DST")
    p.add_argument(
        "--dtype",
        choices=("bf16", "f16", "f32", "fp8", "int8", "int4", "bfloat16", "float16", "float32", "float8"),
        metavar="TYPE",
        help="bf16, f16, f32, or for the linear and expert matrices fp8, int8, int4 (default: as in SRC)",
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="say where everything would go, by config.json and the index alone",
    )
    p.add_argument("--mesh", help="with --dry-run: the mesh whose bytes per chip to tell (tensor=4,fsdp=8)")

    p = verb(
        "quantize",
        _quantize,
        "A smaller checkpoint (int8 by channel, int4 by groups of 128, FP8 by blocks of 128 x 128), and what "
        "the rounding costs: perplexity and KL against SRC.",
        "jaxseek quantize v2-lite/ v2-lite-int8/ --weights int8 --text sample.txt",
    )
    conversion_arguments(p)
    p.add_argument("--weights", choices=("int8", "int4", "fp8"), required=True)
    p.add_argument("--text", metavar="FILE", help="to measure on (default: Python's manual)")
    p.add_argument("--no-report", action="store_true", help="do not load both models to compare them")

    p = verb(
        "verify",
        _verify,
        "Read a checkpoint whole: names, digests, and beside its source every tensor and the logits.",
        "jaxseek verify r1/ --source DeepSeek-R1/",
    )
    p.add_argument("checkpoint", help="what convert or quantize wrote, either format")
    p.add_argument("--source", help="what it was converted from")
    p.add_argument("--memory", type=_size, default="1.5GiB", help="what reading may take (default 1.5GiB)")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")


def _convert(args: argparse.Namespace) -> None:
    if args.mesh and not args.dry_run:
        raise WrongUse("--mesh is for --dry-run: a checkpoint fits every mesh")
    if args.dry_run:
        _rehearse(args)
        return
    summary = _write(args, to=args.to, dtype=args.dtype)
    if args.json:
        print(json.dumps(summary))


def _write(args: argparse.Namespace, **choices: Any) -> dict[str, Any]:
    from jaxseek_convert import convert

    return convert(
        args.src,
        args.dst,
        mtp=not args.no_mtp,
        overwrite=args.overwrite,
        memory=args.memory,
        verify=args.verify,
        checksums=not args.no_checksum,
        **choices,
    )


def _rehearse(args: argparse.Namespace) -> None:
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


def _quantize(args: argparse.Namespace) -> None:
    if args.text:
        place(args.text).read_text(encoding="utf-8")  # an error now, not after the conversion
    summary = _write(args, dtype=args.weights)
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


def _verify(args: argparse.Namespace) -> int:
    from rich.console import Console

    from jaxseek_convert.conversion import bars
    from jaxseek_convert.verify import verify

    with bars(not args.json, Console(stderr=True)) as stage:
        found = verify(args.checkpoint, args.source, memory=args.memory, stage=stage)
    if args.json:
        print(json.dumps(found))
        return 0 if found["ok"] else 1
    damaged, unlike = found.get("damaged", []), found.get("unlike_source", [])
    lines = {
        "names and shapes": f"{found['tensors']:,} tensors, those of its config",
        "digests": f"{len(damaged)} damaged"
        if found["digests"]
        else "none here: not written by a conversion",
    }
    lines |= {f"damaged {i + 1}": name for i, name in enumerate(damaged[:10])}
    if args.source:
        lines["beside its source"] = f"{len(unlike)} tensors differ"
        lines |= {f"differs {i + 1}": name for i, name in enumerate(unlike[:10])}
        logits = found["logits"]
        lines["logits"] = (
            f"{logits['layers']} layers, largest difference {logits['max_difference']:.3g}, "
            f"KL {logits['kl']:.3g}, same token {logits['same_token']:.1%}"
            if logits["layers"]
            else logits["why"]
        )
    table(f"{args.checkpoint}: {'sound' if found['ok'] else 'NOT sound'}", lines)
    return 0 if found["ok"] else 1


def _size(text: str) -> int:
    """Bytes of 1.5GiB, 800M, 2e9."""
    match = re.fullmatch(r"([0-9.e]+?)\s*([kmgt]?)i?b?", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a size such as 1.5GiB or 800M")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))
