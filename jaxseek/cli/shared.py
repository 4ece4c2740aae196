"""Arguments, checks and prompts that several verbs share."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from jaxseek.machine.accelerators import unused_accelerator
from jaxseek.storage.place import place, writable

CONFIG = "preset, checkpoint or Hugging Face directory, or config.json"

_said = False


class WrongUse(Exception):
    """Arguments that do not go together: exit code 2."""


# -------------------------------------------------------------------- arguments


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare the model that is loaded: MODEL, --mesh, --dtype."""
    parser.add_argument(
        "model", help="checkpoint directory, Hugging Face directory, or preset such as tiny-v3"
    )
    parser.add_argument(
        "--mesh", help="axis sizes (tensor=4,data=2), a strategy TOML, or the name of a shipped one"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: float32 on CPU, else bfloat16"
    )


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Declare what `read_prompts` reads."""
    parser.add_argument(
        "-p", "--prompt", action="append", default=[], help="repeatable; - reads standard input"
    )
    parser.add_argument("-f", "--file", help='prompts: a line each, or .jsonl with "prompt" or "messages"')


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Declare how replies are sampled, which `sampling` reads."""
    parser.add_argument("-n", "--max-new-tokens", type=int, default=max_new_tokens, metavar="N")
    parser.add_argument("-t", "--temperature", type=float, default=0.6, help="0 is greedy (default 0.6)")
    parser.add_argument("--top-k", type=int, default=0, help="0 is off")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable"
    )
    parser.add_argument("--no-think", action="store_true", help="ask a thinking model to answer at once")


def sampling(args: argparse.Namespace, seed: int) -> Any:
    """Return the settings of one reply."""
    from jaxseek.engine.sampling import Sampling

    return Sampling(
        args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p, seed, tuple(args.stop)
    )


def add_step(parser: argparse.ArgumentParser, model: str) -> None:
    """Declare a step on a TPU slice, which `plan` and `sweep` compile; `model` is the help of MODEL."""
    parser.add_argument("model", help=model)
    parser.add_argument("--topology", required=True, metavar="CHIP:AxB", help="such as v5e:8x8 or v5p:4x4x4")
    workloads = ("decode", "prefill", "train", "rollout", "grpo")
    parser.add_argument("--workload", choices=workloads, help="default decode")
    parser.add_argument("--context", type=int, help="tokens of a sequence (default 2048)")
    parser.add_argument("--weights", choices=("bf16", "int8", "int4", "fp8"), help="default bf16")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="draw it")


def add_conversion(parser: argparse.ArgumentParser) -> None:
    """Declare a conversion, which `write_checkpoint` does."""
    parser.add_argument(
        "src",
        help="Hugging Face directory, hf://OWNER/NAME, fsspec URL, jaxseek checkpoint, .gguf file or "
        "package:NAME of one",
    )
    parser.add_argument("dst", help="directory to write; must not exist")
    parser.add_argument("--no-mtp", action="store_true", help="leave the multi-token module out")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument(
        "--memory", type=size, default="1.5GiB", help="what the process may take (default 1.5GiB)"
    )
    parser.add_argument("--verify", action="store_true", help="read everything back before DST gets its name")
    parser.add_argument(
        "--no-checksum", action="store_true", help="do not check SRC's files by the hub's SHA-256"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def write_checkpoint(args: argparse.Namespace, **choices: Any) -> dict[str, Any]:
    """Convert as `add_conversion` declares and return the summary."""
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


def size(text: str) -> int:
    """Bytes of 1.5GiB, 800M, 2e9."""
    match = re.fullmatch(r"([0-9.e]+?)\s*([kmgt]?)i?b?", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a size such as 1.5GiB or 800M")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


# -------------------------------------------------------------------- before and at the work


def check_outputs(*names: str | None) -> None:
    """Raise PlaceError for files that cannot be written: asked before the work that ends with them."""
    for name in names:
        if name:
            writable(name)


def say_unused_accelerator(backend: str | None = None) -> None:
    """One line on stderr, once a process, where this machine has an accelerator that JAX does not use.

    Called before a verb runs, which finds what the installed packages cannot drive, and with JAX's `backend`
    where a verb computes with it.
    """
    global _said
    if not _said and (found := unused_accelerator(backend=backend)):
        _said = True
        what, mend = found
        print(f"jaxseek: {what}. Mend it: {mend} (JAX_PLATFORMS=cpu chooses the CPU)", file=sys.stderr)


def load_model(source: str, mesh: str | None, dtype: str | None, quiet: bool = False) -> tuple[Any, Any]:
    """A model and its tokenizer or None, which it says unless `quiet`."""
    import jax

    from jaxseek.api import load

    model, tokenizer = load(source, mesh=mesh, dtype=dtype)
    say_unused_accelerator(jax.default_backend())
    if tokenizer is None and not quiet:
        print("no tokenizer beside the weights: prompts and replies are token ids", file=sys.stderr)
    return model, tokenizer


def read_prompts(given: Sequence[str], file: str | None) -> list[Any]:
    """Texts, or chats as lists of messages: those given, of which - is standard input, then a file's."""
    prompts: list[Any] = [sys.stdin.read() if p == "-" else p for p in given]
    if file:
        lines = place(file).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate((l for l in lines if l.strip()), 1):
            if not file.endswith(".jsonl"):
                prompts.append(line)
                continue
            try:
                row = json.loads(line)
                prompts.append(row["messages"] if "messages" in row else row["prompt"])
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f'{file}, line {number}: expected JSON with "prompt" or "messages"'
                ) from None
    if not prompts:
        raise WrongUse('no prompt: give -p "text", -p - for standard input, or -f FILE')
    return prompts
