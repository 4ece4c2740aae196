"""Talk to a model in the terminal; its thinking is shown apart. /reset forgets, /exit leaves.

example:
  jaxseek chat r1-distill-qwen-1.5b/
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from jaxseek.cli.shared import add_model, add_sampling, add_template, load_model, rendering, sampling, unicode


def add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--system", type=unicode, help="system message")
    add_template(parser)
    add_sampling(parser, 2048)


def run(args: argparse.Namespace) -> None:
    from jaxseek.cli.writer import Writer, print_rates
    from jaxseek.engine.engine import Timing
    from jaxseek.engine.generate import engine_for, request, seed_for, stream
    from jaxseek.engine.text import encode
    from jaxseek.machine.terminal import visible
    from jaxseek.tokenizer.chat import split_reasoning

    how = rendering(args)
    model, tokenizer = load_model(args.model, args.mesh, args.dtype)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer; chat needs one")
    engine, out, base = engine_for(model, 1), Writer(), sampling(args, model, tokenizer)
    engine.dispatch = 8
    first = [{"role": "system", "content": args.system}] if args.system else []
    messages, turn = list(first), 0
    encode(tokenizer, [*first, {"role": "user", "content": "Hello!"}], **how)  # what is wrong is told now
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
        try:
            ids = encode(tokenizer, messages, **how)
            engine.timing = Timing()
            own = dataclasses.replace(base, seed=seed_for(args.seed + turn, ids))
            handle = engine.submit(request(model, tokenizer, ids, own))
        except ValueError as e:
            messages.pop()
            print(visible(f"{e}; /reset starts anew"), file=sys.stderr)
            continue
        opened = tokenizer.opened_think(ids)
        show = out.reasoning(opened)
        try:
            for piece in stream(engine, handle):
                show(piece)
        except KeyboardInterrupt:
            engine.cancel(handle)
            print(" [stopped]", file=sys.stderr)
        out.end()
        reply = split_reasoning(handle.answer.text, opened)[1]
        messages.append({"role": "assistant", "content": reply})
        turn += 1
        print_rates(engine.timing)
