"""Show a model's config, parameters, cache and memory per chip; nothing is loaded.

example:
  jaxseek info deepseek-r1 --mesh expert=16,tensor=4 --context 8192 --batch 128
"""

from __future__ import annotations

import argparse
import json

from jaxseek.cli.shared import CONFIG, WrongUse, number, whole


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help=CONFIG)
    parser.add_argument("--list", action="store_true", help="name every preset")
    parser.add_argument("--mesh", help="axis sizes (tensor=4,data=2) or a strategy TOML")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--context", type=whole(), default=4096, help="tokens per sequence (default 4096)")
    parser.add_argument("--batch", type=whole(), default=1, help="sequences in the cache")
    parser.add_argument(
        "--compute",
        type=number(above=True),
        metavar="FLOPS",
        help="instead of MODEL: what to train with this budget, by DeepSeek LLM's scaling laws",
    )
    parser.add_argument("--json", action="store_true")


def uses_devices(args: argparse.Namespace) -> bool:
    return False


def run(args: argparse.Namespace) -> int | None:
    from jaxseek.config.model import presets
    from jaxseek.machine.terminal import table

    if args.list:
        print(json.dumps(list(presets())) if args.json else "\n".join(presets()))
        return None
    if args.compute is not None:
        from jaxseek.lab.info import budget_rows
        from jaxseek.train.scaling import propose

        if args.model:
            raise WrongUse("--compute proposes a model: leave MODEL out")
        proposal = propose(args.compute, args.context)
        if args.json:
            print(json.dumps(proposal))
        else:
            table(f"{args.compute:.3g} FLOPs", budget_rows(proposal))
        return None
    if not args.model:
        raise WrongUse("no model: give MODEL, --list or --compute")
    from jaxseek.lab.info import describe, read_config, read_quantization

    cfg, specs = read_config(args.model), read_quantization(args.model)
    found = describe(cfg, args.mesh, args.dtype, args.context, args.batch, specs)
    if args.json:
        print(json.dumps(found | {"config": cfg.to_hf()}))
        return None
    mesh = " x ".join(f"{a}={n}" for a, n in found["mesh"].items()) or "one chip"
    gib = 2**30
    cache = found["cache_bytes_per_chip"] / gib
    dtypes = " and ".join([*found["quantized"], args.dtype])
    rows = {
        "architecture": f"{found['model_type']}, {found['attention']}, {found['layers']} layers of "
        f"{found['hidden_size']}, {found['heads']} heads",
        "experts": f"{found['experts']}, {found['experts_per_token']} per token"
        if found["experts"]
        else "none (dense)",
        "vocabulary, context": f"{found['vocab_size']:,}, {found['context']:,} tokens",
        "parameters": f"{found['parameters']:,}",
        "active per token": f"{found['active_parameters']:,}",
        "multi-token module": f"{found['mtp_parameters']:,}" if found["mtp_parameters"] else "none",
        "cache per token": f"{found['cache_bytes_per_token']:,} bytes in {args.dtype}",
        f"weights per chip ({mesh})": f"{found['weight_bytes_per_chip'] / gib:.3f} GiB in {dtypes}",
        f"cache per chip ({args.batch} x {args.context:,} tokens)": f"{cache:.3f} GiB",
    }
    table(args.model, rows)
    return None
