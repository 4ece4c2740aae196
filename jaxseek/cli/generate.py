"""Continue prompts, one or a file of them, streaming to the terminal.

example:
  jaxseek generate v2-lite/ -p "The capital of France is" -n 32 --temperature 0
"""

from __future__ import annotations

import argparse
from typing import Any

from jaxseek.cli.prompts import add_prompts, as_chat, encode_prompts, read_prompts
from jaxseek.cli.shared import add_model, add_sampling, load_model, sampling, unicode, whole

ALL_HOSTS = True


def add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_prompts(parser)
    parser.add_argument(
        "--chat", action="store_true", help="a prompt is a user's message: render the chat template"
    )
    parser.add_argument("--system", type=unicode, help="system message, with --chat")
    parser.add_argument(
        "--samples", type=whole(), default=1, help="replies per prompt, with seeds SEED, SEED+1, ..."
    )
    parser.add_argument("--batch-size", type=whole(), default=16)
    parser.add_argument("--json", action="store_true", help="one line of JSON per reply")
    add_sampling(parser, 256)


def run(args: argparse.Namespace) -> None:
    from jaxseek.cli.writer import Writer, print_rates
    from jaxseek.engine.text import TextStream, engine_for
    from jaxseek.machine.hosts import from_first
    from jaxseek.tokenizer.chat import split_reasoning

    prompts = from_first(lambda: read_prompts(args.prompt, args.file))
    if args.chat:
        prompts = as_chat(prompts, args.system)
    model, tokenizer = load_model(args.model, args.mesh, args.dtype, quiet=args.json)
    encoded = encode_prompts(prompts, tokenizer, model.cfg.vocab_size, False if args.no_think else None)
    jobs: list[tuple[Any, list[int], int]] = [
        (ids if tokenizer is None else prompt.content, ids, args.seed + sample)
        for prompt, ids in zip(prompts, encoded)
        for sample in range(args.samples)
    ]
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
                out.json(row | {"tokens": len(reply.tokens)})
            elif not alone:
                shown = prompt[-1]["content"] if args.chat and isinstance(prompt[-1], dict) else prompt
                out.plain(f"--- {shown}\n{text}\n")
            elif not tokenizer:
                out.plain(f"{text}\n")
        print_rates(engine.timing)
