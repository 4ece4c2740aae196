"""Serve a model over HTTP to the clients of OpenAI's and DeepSeek's interfaces, with a chat page at /.

example:
  jaxseek serve r1-distill-qwen-1.5b/ --port 8000
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "How many r are in strawberry?"}]}'
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from jaxseek.cli.shared import add_model, load_model, number, size, unicode, whole

KEYS = "JAXSEEK_API_KEYS"


def add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1; 0.0.0.0: all)"
    )
    parser.add_argument(
        "--port", type=whole(0, 65535), default=8000, help="default 8000; 0: any that is free"
    )
    parser.add_argument(
        "--name", type=unicode, help="the model's name to clients (default: as its directory)"
    )
    parser.add_argument("--slots", type=whole(1, 4096), default=16, help="answers at a time (default 16)")
    parser.add_argument(
        "--api-key", action="append", default=[], type=unicode, metavar="KEY",
        help=f"ask clients for it; repeatable; better in {KEYS}, with commas between",
    )  # fmt: skip
    parser.add_argument("--queue", type=whole(0), default=256, help="answers that may wait (default 256)")
    parser.add_argument(
        "--timeout",
        type=number(0, above=True),
        default=3600.0,
        metavar="S",
        help="seconds of an answer (default 3600)",
    )
    parser.add_argument("--body", type=size, default="16MiB", help="size of a request (default 16MiB)")


def run(args: argparse.Namespace) -> int:
    try:
        import uvicorn

        from jaxseek.serve.app import Options, create
    except ImportError as error:
        raise ValueError(f"serving needs the serve extra ({error}): pip install 'jaxseek[serve]'") from None
    from jaxseek.engine.engine import Engine
    from jaxseek.engine.generate import settings

    keys = [*args.api_key, *(k for k in os.environ.get(KEYS, "").split(",") if k)]
    model, tokenizer = load_model(args.model, args.mesh, args.dtype)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer; clients send text")
    if said := settings(model.cfg.generation, {})[1]:
        print(said, file=sys.stderr)
    options = Options(
        name=args.name or Path(args.model).resolve().name, keys=tuple(keys), queue=args.queue,
        timeout=args.timeout, body_bytes=args.body,
    )  # fmt: skip
    app = create(Engine(model, args.slots, mode="filtered", dispatch=8), tokenizer, options)
    where = {"host": args.host, "port": args.port}
    config = uvicorn.Config(app, **where, log_level="warning", timeout_graceful_shutdown=60)
    server = uvicorn.Server(config)
    with config.bind_socket() as socket:
        host, port = socket.getsockname()[:2]
        who = "clients with a key" if keys else "anybody who reaches it"
        print(f"{options.name} for {who}: http://{host}:{port}/ and /v1", file=sys.stderr)
        server.run(sockets=[socket])
    return 0
