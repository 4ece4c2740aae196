"""Compare placements of experts by the load of the slowest device: a trace of routed experts, served with
the experts in order, placed by DeepSeek's load balancer, and with redundant copies. The trace is a file, or
is recorded: MODEL decodes the prompts side by side.

example:
  jaxseek placement v2-lite/ -f prompts.txt -n 64 --devices 8 --redundant 8 --save trace.npz
"""

from __future__ import annotations

import argparse

from jaxseek.cli.prompts import add_prompts, encode_prompts, read_prompts
from jaxseek.cli.shared import WrongUse, check_outputs, load_model, number, whole


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="TRACE|MODEL", help="a trace (.npz, .npy), or a model as `generate` takes"
    )
    parser.add_argument("--devices", type=whole(), required=True, help="that the experts are spread over")
    parser.add_argument(
        "--redundant", type=whole(0), default=0, metavar="N", help="slots beyond one for each expert"
    )
    parser.add_argument(
        "--nodes", type=whole(), default=1, help="groups of experts stay within one (default 1)"
    )
    add_prompts(parser)
    parser.add_argument("-n", "--max-new-tokens", type=whole(), default=64, metavar="N")
    parser.add_argument("-t", "--temperature", type=number(), default=0.6, help="0 is greedy (default 0.6)")
    parser.add_argument("--mesh", help="of the model that is recorded, as `generate` takes it")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--save", metavar="FILE", help="write the recorded trace, .npz")
    parser.add_argument(
        "--place",
        metavar="FILE",
        help="write where the load balancer puts the experts by the whole trace, for a strategy's TOML: "
        '[weights] redundant_experts = N, placement = "FILE"',
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="draw it")


def run(args: argparse.Namespace) -> None:
    from jaxseek.lab import replay

    check_outputs(args.save, args.place, args.plot)
    if args.source.endswith((".npz", ".npy")):
        if args.prompt or args.file or args.save:
            raise WrongUse(f"{args.source} is a trace already: -p, -f and --save are for a model")
        load = replay.read_load(args.source)
    else:
        from jaxseek.engine.sampling import Sampling

        prompts = read_prompts(args.prompt, args.file)
        model, tokenizer = load_model(args.source, args.mesh, args.dtype, quiet=args.json)
        ids = encode_prompts(prompts, tokenizer, model.cfg.vocab_size)
        stops = tuple(dict.fromkeys((*model.cfg.eos_ids, *(tokenizer.eos_ids if tokenizer else ()))))
        sampling = Sampling(args.max_new_tokens, args.temperature, stop_ids=stops)
        load = replay.record(model, ids, sampling, args.save)
    served = replay.compare(load, args.devices, args.redundant, args.nodes)
    if args.place:
        replay.keep(load, args.devices, args.redundant, args.nodes, args.place)
    replay.show(load, served, args.json, args.plot)
