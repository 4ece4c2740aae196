"""Continue prompts, one or a file of them, streaming to the terminal.

example:
  jaxseek generate v2-lite/ -p "The capital of France is" -n 32 --temperature 0
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from jaxseek.cli.shared import add_model, add_prompts, add_sampling, load_model, read_prompts, sampling
from jaxseek.cli.writer import Writer, print_rates

ALL_HOSTS = True


def add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_prompts(parser)
    parser.add_argument(
        "--chat", action="store_true", help="a prompt is a user's message: render the chat template"
    )
    parser.add_argument("--system", help="system message, with --chat")
    parser.add_argument(
        "--samples", type=int, default=1, help="replies per prompt, with seeds SEED, SEED+1, ..."
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="one line of JSON per reply")
    add_sampling(parser, 256)


def run(args: argparse.Namespace) -> None:
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
    engine, out = engine_for(model), Writer()
    for start in range(0, len(jobs), args.batch_size):
        part = jobs[start : start + args.batch_size]
        requests = [sampling(args, seed) for _, _, seed in part]
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
        print_rates(engine.timing)
