"""`jaxseek VERB`: the command line. Verbs import what they need when they run: --help costs nothing."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import jaxseek
from jaxseek.cli.convert import add_conversion_verbs
from jaxseek.cli.doctor import add_doctor_verb
from jaxseek.cli.lab import add_lab_verbs
from jaxseek.cli.shared import WrongUse, load_model, read_prompts, say_unused_accelerator
from jaxseek.machine.terminal import table

ALL_HOSTS = ("train", "convert", "quantize", "generate", "plan")  # others run on host 0 alone
NO_DEVICES = ("info", "sweep", "plan")  # the last but with --run


def main(argv: list[str] | None = None) -> int:
    """Run a verb. Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong use."""
    args = _parser().parse_args(argv)
    _set_up_jax()
    from jaxseek.machine import hosts

    if args.verb != "doctor":  # which says more
        say_unused_accelerator()
    joined, about = None, f"jaxseek {args.verb}: error:"
    try:
        runs = args.verb not in NO_DEVICES or getattr(args, "repeats", 0)
        devices = bool(runs) and not getattr(args, "dry_run", False) and not getattr(args, "list", False)
        if devices and args.verb in ALL_HOSTS:
            joined = hosts.join()
        elif args.verb != "doctor" and not hosts.runs_here(args.verb, devices):  # which tells of each host
            return 0
        if joined:
            about = f"{about} host {joined.index}:"
        with hosts.quiet(bool(joined and joined.index)):
            return args.run(args) or 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 1
    except WrongUse as e:
        print(f"{about} {e}; see jaxseek {args.verb} --help", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of our output has left: no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as e:
        text = _in_one_line(e)
        if text is None and not joined:
            raise
        print(f"{about} {text or traceback.format_exc()}", file=sys.stderr)
        code = 1
    if joined:
        hosts.leave_failed(joined.index, code)
    return code


def _in_one_line(e: Exception) -> str | None:
    """Tell what was wrong; None for an error that is no fault of the user's or the machine's."""
    if os.environ.get("JAXSEEK_TRACEBACK"):
        return None
    if isinstance(e, RuntimeError) and "Unable to initialize backend" in str(e):
        return f"{e}; jaxseek doctor says more"
    return str(e) if isinstance(e, ValueError | OSError) else None


def _set_up_jax() -> None:
    """Keep compiled programs between runs, unless the user has chosen a place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxseek" / "xla"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="jaxseek", description="The DeepSeek family in JAX: convert, generate, chat, inspect."
    )
    top.add_argument("--version", action="version", version=f"jaxseek {jaxseek.__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
        p = verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        p.set_defaults(run=run)
        return p

    p = verb(
        "quickstart",
        _quickstart,
        "A tiny DeepSeek-V3 learns to think by GRPO, here and now: trained, measured, drawn, exported.",
        "jaxseek quickstart --out runs/quickstart",
    )
    p.add_argument("--out", default="runs/quickstart", metavar="DIR", help="where it goes (and goes on from)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--minutes", type=float, default=5.0, help="at most this long (default 5)")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")

    add_conversion_verbs(verb)

    def model_arguments(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "model", help="checkpoint directory, Hugging Face directory, or preset such as tiny-v3"
        )
        p.add_argument(
            "--mesh", help="axis sizes (tensor=4,data=2), a strategy TOML, or the name of a shipped one"
        )
        p.add_argument(
            "--dtype", choices=("bfloat16", "float32"), help="default: float32 on CPU, else bfloat16"
        )

    def sampling_arguments(p: argparse.ArgumentParser, max_new_tokens: int) -> None:
        p.add_argument("-n", "--max-new-tokens", type=int, default=max_new_tokens, metavar="N")
        p.add_argument("-t", "--temperature", type=float, default=0.6, help="0 is greedy (default 0.6)")
        p.add_argument("--top-k", type=int, default=0, help="0 is off")
        p.add_argument("--top-p", type=float, default=0.95)
        p.add_argument("--min-p", type=float, default=0.0)
        p.add_argument("--seed", type=int, default=0)
        p.add_argument(
            "--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable"
        )
        p.add_argument("--no-think", action="store_true", help="ask a thinking model to answer at once")

    p = verb(
        "generate",
        _generate,
        "Continue prompts, one or a file of them, streaming to the terminal.",
        'jaxseek generate v2-lite/ -p "The capital of France is" -n 32 --temperature 0',
    )
    model_arguments(p)
    p.add_argument("-p", "--prompt", action="append", default=[], help="repeatable; - reads standard input")
    p.add_argument("-f", "--file", help='prompts: a line each, or .jsonl with "prompt" or "messages"')
    p.add_argument(
        "--chat", action="store_true", help="a prompt is a user's message: render the chat template"
    )
    p.add_argument("--system", help="system message, with --chat")
    p.add_argument("--samples", type=int, default=1, help="replies per prompt, with seeds SEED, SEED+1, ...")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--json", action="store_true", help="one line of JSON per reply")
    sampling_arguments(p, 256)

    p = verb(
        "chat",
        _chat,
        "Talk to a model in the terminal; its thinking is shown apart. /reset forgets, /exit leaves.",
        "jaxseek chat r1-distill-qwen-1.5b/",
    )
    model_arguments(p)
    p.add_argument("--system", help="system message")
    sampling_arguments(p, 2048)

    p = verb(
        "train",
        _train,
        "Pretraining, SFT, DPO, distillation, GRPO or a pipeline of them by a run file; the same command "
        "goes on with a stopped run.",
        "jaxseek train pretrain-tiny --set steps=100 --set out=runs/mine",
    )
    p.add_argument("run_file", nargs="?", metavar="RUN.toml", help="run file, or the name of a shipped one")
    p.add_argument("--list", action="store_true", help="name every shipped run file and what it trains")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key (data.length=512)"
    )
    p.add_argument("--json", action="store_true", help="end with one line of JSON")

    p = verb(
        "info",
        _info,
        "Config, parameters, cache and memory per chip; nothing is loaded.",
        "jaxseek info deepseek-r1 --mesh expert=16,tensor=4 --context 8192 --batch 128",
    )
    p.add_argument("model", nargs="?", help="preset, checkpoint or Hugging Face directory, or config.json")
    p.add_argument("--list", action="store_true", help="name every preset")
    p.add_argument("--mesh", help="axis sizes (tensor=4,data=2) or a strategy TOML")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--context", type=int, default=4096, help="tokens per sequence (default 4096)")
    p.add_argument("--batch", type=int, default=1, help="sequences in the cache")
    p.add_argument(
        "--compute",
        type=float,
        metavar="FLOPS",
        help="instead of MODEL: what to train with this budget, by DeepSeek LLM's scaling laws",
    )
    p.add_argument("--json", action="store_true")

    p = verb(
        "bench",
        _bench,
        "Prefill and decode speed here, with the fraction of the machine's memory bandwidth; with --train "
        "the speed and memory of training steps, with the fraction of its FLOPs; with --grpo of GRPO steps.",
        "jaxseek bench tiny-v3 --batch 1 8 --against transformers\n"
        "  jaxseek bench tiny-v3 --train --rows 4 --length 256 --against transformers\n"
        "  jaxseek bench tiny-v3 --grpo --against trl",
    )
    model_arguments(p)
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    p.add_argument("--prompt-tokens", type=int, default=64)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--train", action="store_true", help="time training steps, not generation")
    p.add_argument(
        "--grpo", action="store_true", help="time GRPO steps: 8 prompts x 8 answers, 64 + 64 tokens"
    )
    p.add_argument("--rows", type=int, default=4, help="with --train: sequences of a step")
    p.add_argument("--length", type=int, default=256, help="with --train: tokens of a sequence")
    p.add_argument(
        "--remat",
        nargs="+",
        choices=("none", "dots", "costly", "full"),
        default=["none"],
        help="with --train: what the backward pass computes again instead of keeping it; each is timed",
    )
    p.add_argument("--repeats", type=int, default=5, help="interleaved runs; the median is reported")
    p.add_argument(
        "--against", choices=("transformers", "trl"), help="time this too (needs the parity extra)"
    )
    p.add_argument("--json", action="store_true")

    add_lab_verbs(verb)
    add_doctor_verb(verb)
    return top


# -------------------------------------------------------------------- verbs


def _quickstart(args: argparse.Namespace) -> None:
    import jax

    from jaxseek.machine.host_memory import keep_freed_memory
    from jaxseek.recipes.quickstart import quickstart

    keep_freed_memory()
    say_unused_accelerator(jax.default_backend())
    result = quickstart(args.out, args.seed, args.minutes)
    print(result)
    if args.json:
        print(json.dumps(dataclasses.asdict(result)))


def _sampling(args: argparse.Namespace, seed: int) -> Any:
    from jaxseek.engine.sampling import Sampling

    return Sampling(
        args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p, seed, tuple(args.stop)
    )


def _train(args: argparse.Namespace) -> int:
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


def _generate(args: argparse.Namespace) -> None:
    from jaxseek.engine.text import TextStream, encode, engine_for
    from jaxseek.machine.hosts import from_first
    from jaxseek.tokenizer.chat import split_reasoning

    prompts = from_first(lambda: read_prompts(args.prompt, args.file))
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system else []
        prompts = [[*system, {"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    model, tokenizer = load_model(args.model, args.mesh, args.dtype, quiet=args.json)
    thinking = False if args.no_think else None
    if tokenizer is None:
        prompts = [[int(i) for i in p.split()] if isinstance(p, str) else p for p in prompts]
    jobs = [(p, encode(tokenizer, p, thinking), args.seed + s) for p in prompts for s in range(args.samples)]
    engine, out = engine_for(model), _Writer()
    for start in range(0, len(jobs), args.batch_size):
        part = jobs[start : start + args.batch_size]
        requests = [_sampling(args, seed) for _, _, seed in part]
        alone = len(jobs) == 1 and not args.json
        stream = TextStream(engine, tokenizer, [ids for _, ids, _ in part], requests, 8 if alone else 32)
        opened = bool(tokenizer) and tokenizer.opened_think(part[0][1])
        if alone and not args.chat:
            out.prompt(part[0][0])
        show = out.reasoning(opened) if args.chat else out.plain
        for pieces in stream:
            if alone:
                show(pieces[0])
        if alone and tokenizer:
            out.end()
        for (prompt, ids, seed), reply in zip(part, stream.replies()):
            text = reply.text if tokenizer else " ".join(map(str, reply.tokens))
            if args.json:
                reasoning, answer = split_reasoning(text, bool(tokenizer) and tokenizer.opened_think(ids))
                row = {"prompt": prompt, "text": text, "seed": seed, "finish_reason": reply.finish_reason}
                if args.chat:
                    row |= {"reasoning": reasoning, "answer": answer}
                print(json.dumps(row | {"tokens": len(reply.tokens)}, ensure_ascii=False), flush=True)
            elif not alone:
                shown: Any = prompt if isinstance(prompt, str) or not args.chat else prompt[-1]
                print(f"--- {shown['content'] if isinstance(shown, dict) else shown}\n{text}", flush=True)
            elif not tokenizer:
                print(text)
        _rates(engine.timing)


def _chat(args: argparse.Namespace) -> None:
    from jaxseek.engine.text import TextStream, encode, engine_for
    from jaxseek.tokenizer.chat import split_reasoning

    model, tokenizer = load_model(args.model, args.mesh, args.dtype)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer; chat needs one")
    engine, out = engine_for(model), _Writer()
    first = [{"role": "system", "content": args.system}] if args.system else []
    messages, turn = list(first), 0
    print("/reset forgets the conversation, /exit leaves", file=sys.stderr)
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if text.strip() in ("/exit", "/quit"):
            return
        if text.strip() == "/reset":
            messages = list(first)
            continue
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        ids = encode(tokenizer, messages, False if args.no_think else None)
        opened = tokenizer.opened_think(ids)
        show = out.reasoning(opened)
        stream = TextStream(engine, tokenizer, [ids], [_sampling(args, args.seed + turn)], 8)
        try:
            for pieces in stream:
                show(pieces[0])
        except ValueError as e:
            messages.pop()
            print(f"{e}; /reset starts anew", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print(" [stopped]", file=sys.stderr)
        out.end()
        reply = stream.replies()[0].text
        messages.append({"role": "assistant", "content": split_reasoning(reply, opened)[1]})
        turn += 1
        _rates(engine.timing)


class _Writer:
    """Streams text to standard output; reasoning is dim where the terminal can show it."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.flush: Any = None

    def plain(self, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    def prompt(self, prompt: Any) -> None:
        if isinstance(prompt, str) and self.console.is_terminal:
            self.console.print(prompt, end="", style="bold")

    def reasoning(self, opened: bool) -> Any:
        """A function that writes pieces of a reply, its thinking between [thinking] marks and dimmed."""
        from jaxseek.tokenizer.chat import ReasoningSplitter

        splitter, state = ReasoningSplitter(opened), {"kind": "answer"}

        def parts(parts: list[tuple[str, str]]) -> None:
            for kind, text in parts:
                if kind != state["kind"]:
                    self.console.print("[thinking] " if kind == "reasoning" else "\n\n", end="", style="dim")
                    state["kind"] = kind
                self.console.print(text, end="", style="dim" if kind == "reasoning" else None)
            sys.stdout.flush()

        self.flush = lambda: parts(splitter.flush())
        return lambda piece: parts(splitter.feed(piece))

    def end(self) -> None:
        if self.flush:
            self.flush()
            self.flush = None
        print(flush=True)


def _rates(timing: Any) -> None:
    prefill = timing.prefill_tokens / timing.prefill_seconds
    print(
        f"[{timing.prefill_tokens} prompt tokens in {timing.prefill_seconds:.2f} s ({prefill:.0f} tok/s); "
        f"{timing.decode_tokens} new at {timing.decode_rate:.1f} tok/s, compilation included]",
        file=sys.stderr,
    )


def _info(args: argparse.Namespace) -> int | None:
    from jaxseek.config.model import presets

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


def _bench(args: argparse.Namespace) -> None:
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
