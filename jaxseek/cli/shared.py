"""Arguments and checks that several verbs share; prompts and the text of replies have files of their own."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any

from jaxseek.config.formats import FORMATS
from jaxseek.machine.accelerators import unused_accelerator
from jaxseek.storage.place import writable

CONFIG = "preset, checkpoint or Hugging Face directory, or config.json"

MOST = 2**31 - 1  # largest size or count: int32 on the devices

_said = False


class WrongUse(Exception):
    """Arguments that do not go together: exit code 2."""


# -------------------------------------------------------------------- types of arguments


def whole(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """Return the type of a whole number within bounds."""

    def parse(text: str) -> int:
        try:
            found = int(text)
        except ValueError:  # not a number, or more digits than Python reads
            found = None
        if found is None or not least <= found <= most:
            raise argparse.ArgumentTypeError(
                f"is {_brief(text)}, expected a whole number from {least} to {most:,}"
            )
        return found

    return parse


def number(
    least: float = 0.0, most: float = sys.float_info.max, above: bool = False
) -> Callable[[str], float]:
    """Return the type of a finite number within bounds; with `above`, `least` itself is outside."""
    expected = f"a number {'above' if above else 'from'} {least:g}"
    expected += f" to {most:g}" if most < sys.float_info.max else "" if above else " on"

    def parse(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not least <= found <= most or (above and found == least):  # NaN is not between any bounds
            raise argparse.ArgumentTypeError(f"is {_brief(text)}, expected {expected}")
        return found

    return parse


def size(text: str) -> int:
    """Parse bytes: 1.5GiB, 800M, 2e9."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)(e[0-9]{1,2})?\s*([kmgt]?)i?b?", text.lower())
    found = float(match[1] + (match[2] or "")) * 1024 ** " kmgt".index(match[3] or " ") if match else 0
    if not 1 <= found <= sys.maxsize:
        raise argparse.ArgumentTypeError(f"is {_brief(text)}, expected a size such as 1.5GiB or 800M")
    return int(found)


def unicode(text: str) -> str:
    """Parse text for a model, which has to be valid: Python keeps undecodable bytes of a command line."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        at = f"a byte at character {e.start + 1} that is not {sys.getfilesystemencoding()}"
        raise argparse.ArgumentTypeError(f"is {_brief(text)} with {at}, expected text") from None
    return text


def stop_text(text: str) -> str:
    """Parse a text at which replies end."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, expected a text to end at")
    return unicode(text)


def _brief(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + "...")


# -------------------------------------------------------------------- arguments


def add_model(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Declare the model that is loaded: MODEL, --mesh, --dtype."""
    parser.add_argument(
        "model",
        nargs="?" if optional else None,
        help="checkpoint directory, Hugging Face directory, or preset such as tiny-v3",
    )
    parser.add_argument(
        "--mesh", help="axis sizes (tensor=4,data=2), a strategy TOML, or the name of a shipped one"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: float32 on CPU, else bfloat16"
    )


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Declare how replies are sampled, which `sampling` reads.

    What is not given is as the checkpoint's generation_config.json has it, before the defaults named here.
    """
    parser.add_argument("-n", "--max-new-tokens", type=whole(), metavar="N", help=f"default {max_new_tokens}")
    parser.set_defaults(most_new_tokens=max_new_tokens)
    parser.add_argument("-t", "--temperature", type=number(), help="0 is greedy (default 0.6)")
    parser.add_argument("--top-k", type=whole(0), help="0 is off (default)")
    parser.add_argument("--top-p", type=number(0, 1, above=True), help="default 0.95")
    parser.add_argument("--min-p", type=number(0, 1), help="0 is off (default)")
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0)
    parser.add_argument(
        "--stop",
        action="append",
        type=stop_text,
        default=[],
        metavar="TEXT",
        help="end at this text; repeatable",
    )


def sampling(args: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """Return the settings of replies, with seed 0, and say which are the checkpoint's own."""
    from jaxseek.engine.generate import settings

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(args, name) for name in names} | {"stop": tuple(args.stop) or None}
    strings, most = tokenizer is not None, args.most_new_tokens
    found, said = settings(model.cfg.generation, given, strings, max_new_tokens=most)
    if said:
        print(said, file=sys.stderr)
    return found


def add_template(parser: argparse.ArgumentParser) -> None:
    """Declare how conversations are rendered, which `rendering` reads."""
    parser.add_argument(
        "--template", metavar="FILE", help="chat template in place of the model's own: a file, or a name"
    )
    parser.add_argument(
        "--template-arg",
        action="append",
        type=unicode,
        default=[],
        metavar="NAME=VALUE",
        help="variable of the template, such as enable_thinking=false; repeatable",
    )
    parser.add_argument("--tools", metavar="FILE", help="JSON list of the functions that may be called")
    parser.add_argument("--no-think", action="store_true", help="ask a thinking model to answer at once")


def rendering(args: argparse.Namespace) -> dict[str, Any]:
    """Read what `add_template` declares, as arguments of `encode`; empty where nothing is given.

    Raises WrongUse for a variable without a value, ValueError for a file that cannot be used.
    """
    from jaxseek.storage.place import place
    from jaxseek.tokenizer.chat import TEMPLATES, check_tables
    from jaxseek.tokenizer.template import template_text

    found: dict[str, Any] = {"thinking": False} if args.no_think else {}
    if args.template:
        known = args.template in TEMPLATES or not place(args.template).exists()  # or one that the model has
        found["template"] = args.template if known else template_text(args.template)
    for given in args.template_arg:
        name, equals, value = given.partition("=")
        if not name or not equals:
            raise WrongUse(f"--template-arg is {_brief(given)}, expected NAME=VALUE")
        with contextlib.suppress(ValueError, RecursionError):  # else it is text
            value = json.loads(value)
        found.setdefault("chat_template_kwargs", {})[name] = value
    if args.tools:
        try:
            found["tools"] = json.loads(place(args.tools).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{args.tools}: not valid JSON ({e})") from None
        try:
            check_tables("tools", found["tools"])
        except ValueError as e:
            raise ValueError(f"{args.tools}: {e}") from None
    return found


def add_step(parser: argparse.ArgumentParser, model: str) -> None:
    """Declare a step on a TPU slice, which `plan` and `sweep` compile; `model` is the help of MODEL."""
    parser.add_argument("model", help=model)
    parser.add_argument("--topology", required=True, metavar="CHIP:AxB", help="such as v5e:8x8 or v5p:4x4x4")
    workloads = ("decode", "prefill", "train", "rollout", "grpo")
    parser.add_argument("--workload", choices=workloads, help="default decode")
    parser.add_argument("--context", type=whole(), help="tokens of a sequence (default 2048)")
    parser.add_argument("--weights", choices=("bf16", *FORMATS), help="default bf16")
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
        "--no-checksum", action="store_true", help="do not check SRC's files by their digests"
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


# -------------------------------------------------------------------- before and at the work


def check_outputs(*names: str | None) -> None:
    """Raise PlaceError if a file cannot be written; call it before the work that ends with writing it."""
    for name in names:
        if name:
            writable(name)


def say_unused_accelerator(backend: str | None = None) -> None:
    """Print a line on stderr, once a process, if this machine has an accelerator that JAX does not use.

    Called before a verb runs, which finds what the installed packages cannot drive, and with JAX's `backend`
    where a verb computes with it.
    """
    global _said
    if not _said and (found := unused_accelerator(backend=backend)):
        _said = True
        what, mend = found
        print(f"jaxseek: {what}. Mend it: {mend} (JAX_PLATFORMS=cpu chooses the CPU)", file=sys.stderr)


def load_model(source: str, mesh: str | None, dtype: str | None, quiet: bool = False) -> tuple[Any, Any]:
    """Load a model and its tokenizer; without one, return None for it and say so unless `quiet`."""
    import jax

    from jaxseek.api import load

    model, tokenizer = load(source, mesh=mesh, dtype=dtype)
    say_unused_accelerator(jax.default_backend())
    if tokenizer is None and not quiet:
        print("no tokenizer beside the weights: prompts and replies are token ids", file=sys.stderr)
    return model, tokenizer
