"""Read a checkpoint whole: names, digests, and beside its source every tensor and the logits.

example:
  jaxseek verify r1/ --source DeepSeek-R1/
"""

from __future__ import annotations

import argparse
import json

from jaxseek.cli.shared import size


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="what convert, quantize or a run wrote, either format")
    parser.add_argument("--source", help="what it was converted from")
    parser.add_argument(
        "--memory", type=size, default="1.5GiB", help="what reading may take (default 1.5GiB)"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    from jaxseek.machine.terminal import PlainConsole, table
    from jaxseek_convert.conversion import bars
    from jaxseek_convert.verify import verify

    with bars(not args.json, PlainConsole(stderr=True)) as stage:
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
