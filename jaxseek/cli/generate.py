"""Continue prompts, one or a file of them, streaming to the terminal.

example:
  jaxseek generate v2-lite/ -p "The capital of France is" -n 32 --temperature 0
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from jaxseek.cli.prompts import add_prompts, as_chats, encode_prompts, is_chat, messages, read_prompts
from jaxseek.cli.shared import (
    add_model,
    add_sampling,
    add_template,
    load_model,
    rendering,
    sampling,
    unicode,
    whole,
)

ALL_HOSTS = True


def add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_prompts(parser)
    parser.add_argument(
        "--chat", action="store_true", help="a prompt is a user's message: render the chat template"
    )
    parser.add_argument("--system", type=unicode, help="system message of every chat")
    add_template(parser)
    parser.add_argument(
        "--samples",
        type=whole(1, 1_000_000),
        default=1,
        help="replies per prompt, with seeds SEED, SEED+1, ...",
    )
    parser.add_argument("--batch-size", type=whole(), default=16)
    parser.add_argument("--json", action="store_true", help="one line of JSON per reply")
    add_sampling(parser, 256)


def run(args: argparse.Namespace) -> int:
    from jaxseek.cli.writer import Writer, print_rates
    from jaxseek.engine.engine import Timing
    from jaxseek.engine.generate import engine_for, in_order, request, seed_for, stream
    from jaxseek.machine.hosts import from_first
    from jaxseek.machine.terminal import visible
    from jaxseek.tokenizer.chat import split_reasoning

    prompts, how = from_first(lambda: (read_prompts(args.prompt, args.file), rendering(args)))
    prompts = as_chats(prompts, args.chat, args.system, how)
    model, tokenizer = load_model(args.model, args.mesh, args.dtype, quiet=args.json)
    encoded = encode_prompts(prompts, tokenizer, model.cfg.vocab_size, how)
    base, out = sampling(args, model, tokenizer), Writer()
    jobs = [
        (prompt, ids, args.seed + sample)
        for prompt, ids in zip(prompts, encoded)
        for sample in range(args.samples)
    ]
    requests = [
        request(model, tokenizer, ids, dataclasses.replace(base, seed=seed_for(seed, ids)))
        for _, ids, seed in jobs
    ]
    engine = engine_for(model, min(args.batch_size, len(jobs)))
    engine.timing = Timing()
    if len(jobs) == 1 and not args.json:
        (prompt, ids, _), engine.dispatch = jobs[0], 8
        handle = engine.submit(requests[0])
        chat = is_chat(prompt.content)
        if not chat:
            out.prompt(prompt.content)
        show = out.reasoning(bool(tokenizer) and tokenizer.opened_think(ids)) if chat else out.plain
        for piece in stream(engine, handle):
            show(piece)
        if tokenizer:
            out.end()
        else:
            out.plain(" ".join(map(str, handle.answer.tokens)) + "\n")
        print_rates(engine.timing)
        return 0
    failed = False
    for (prompt, ids, seed), answer in zip(jobs, in_order(engine.run(requests))):
        content = ids if tokenizer is None else prompt.content
        if isinstance(answer, ValueError):
            failed = True
            print(visible(f"{prompt.where}: {answer}"), file=sys.stderr)
            if args.json:
                out.json({"prompt": content, "seed": seed, "error": str(answer)})
            continue
        text = answer.text if tokenizer else " ".join(map(str, answer.tokens))
        if args.json:
            row = {"prompt": content, "text": text, "seed": seed, "finish_reason": answer.finish_reason}
            if is_chat(content):
                opened = bool(tokenizer) and tokenizer.opened_think(ids)
                row |= dict(zip(("reasoning", "answer"), split_reasoning(text, opened)))
            out.json(row | {"tokens": len(answer.tokens)})
        else:
            shown: Any = messages(content)[-1]["content"] if is_chat(content) else content
            out.plain(f"--- {shown}\n{text}\n")
    print_rates(engine.timing)
    return int(failed)
