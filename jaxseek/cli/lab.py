"""The verbs of the sharding lab: plan, sweep, placement."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from jaxseek.cli.shared import WrongUse, check_outputs, load_model, read_prompts


def add_lab_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Declare them; `verb` makes a parser of a name, what runs it, its description and an example."""
    p = verb(
        "plan",
        _plan,
        "What a step costs on a TPU slice, by compiling it for the slice where there is no TPU: memory, "
        "time, the dearest operations, every collective; of a GRPO step the memory at each of its points. "
        "Exit code 1 where it does not fit.",
        "jaxseek plan deepseek-v2-lite --topology v5e:2x4 --workload decode --batch 8 --context 2048\n"
        "  jaxseek plan configs/runs/grpo-r1-qwen-1.5b.v5e-1.toml --topology v5e:1x1",
    )

    def lab_arguments(p: argparse.ArgumentParser, model: str, **defaults: Any) -> None:
        p.add_argument("model", help=model)
        p.add_argument("--topology", required=True, metavar="CHIP:AxB", help="such as v5e:8x8 or v5p:4x4x4")
        workloads = ("decode", "prefill", "train", "rollout", "grpo")
        p.add_argument("--workload", choices=workloads, help="default decode")
        p.add_argument("--context", type=int, help="tokens of a sequence (default 2048)")
        p.add_argument("--weights", choices=("bf16", "int8", "int4", "fp8"), help="default bf16")
        p.add_argument("--json", action="store_true")
        p.add_argument("--plot", metavar="FILE", help="draw it")
        p.set_defaults(**defaults)

    one = "preset, checkpoint or Hugging Face directory, or config.json"
    lab_arguments(p, f"{one}; or a run file (RUN.toml), which says all that `jaxseek train` would do")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of a run file"
    )
    p.add_argument(
        "--mesh",
        help="axis sizes (tensor=4,expert=2), a strategy TOML, or a shipped one's name (default: the shipped "
        "layout for this model, slice and workload, or else sizes chosen by a first estimate)",
    )
    p.add_argument(
        "--batch", type=int, help="sequences (default 8; to train, as many as devices if these are more)"
    )
    p.add_argument("--lora", type=int, metavar="RANK", help="train and grpo: only adapters learn")
    p.add_argument(
        "--remat",
        choices=("none", "dots", "costly", "full"),
        help="of training: what the backward pass computes again, as in a run file (default full)",
    )
    p.add_argument("--hlo", metavar="FILE", help="write the compiled program's text")
    p.add_argument(
        "--run",
        dest="repeats",
        nargs="?",
        type=int,
        const=10,
        default=0,
        metavar="N",
        help="on that slice: run the step N times too (default 10), and print the median beside the estimate",
    )
    p.add_argument("--trace", metavar="DIR", help="with --run: write a profile of a step there, for xprof")

    p = verb(
        "sweep",
        _sweep,
        "Compare layouts of a step on a TPU slice: the shipped rule tables with all sizes, pruned by a first "
        "estimate, compiled as `plan` does. Started again, it goes on where it was.",
        "jaxseek sweep deepseek-v2-lite --topology v5e:2x4 --batch 8 64 --plot sweep.png",
    )
    lab_arguments(p, one, workload="decode", context=2048, weights="bf16")
    p.add_argument("--mesh", nargs="+", default=[], help="compare these instead, each as `plan` takes it")
    p.add_argument("--batch", type=int, nargs="+", default=[8], help="sequences; several are compared")
    p.add_argument("--keep", type=int, default=8, metavar="N", help="layouts to compile for each batch")

    p = verb(
        "placement",
        _placement,
        "What a placement of experts does to the slowest device: a trace of routed experts, served with the "
        "experts in order, placed by DeepSeek's load balancer, and with redundant copies. The trace is a "
        "file, or is recorded: MODEL decodes the prompts side by side.",
        "jaxseek placement v2-lite/ -f prompts.txt -n 64 --devices 8 --redundant 8 --save trace.npz",
    )
    p.add_argument(
        "source", metavar="TRACE|MODEL", help="a trace (.npz, .npy), or a model as `generate` takes"
    )
    p.add_argument("--devices", type=int, required=True, help="that the experts are spread over")
    p.add_argument("--redundant", type=int, default=0, metavar="N", help="slots beyond one for each expert")
    p.add_argument("--nodes", type=int, default=1, help="groups of experts stay within one (default 1)")
    p.add_argument("-p", "--prompt", action="append", default=[], help="repeatable; - reads standard input")
    p.add_argument("-f", "--file", help='prompts: a line each, or .jsonl with "prompt" or "messages"')
    p.add_argument("-n", "--max-new-tokens", type=int, default=64, metavar="N")
    p.add_argument("-t", "--temperature", type=float, default=0.6, help="0 is greedy (default 0.6)")
    p.add_argument("--mesh", help="of the model that is recorded, as `generate` takes it")
    p.add_argument("--dtype", choices=("bfloat16", "float32"))
    p.add_argument("--save", metavar="FILE", help="write the recorded trace, .npz")
    p.add_argument(
        "--place",
        metavar="FILE",
        help="write where the load balancer puts the experts by the whole trace, for a strategy's TOML: "
        '[weights] redundant_experts = N, placement = "FILE"',
    )
    p.add_argument("--json", action="store_true")
    p.add_argument("--plot", metavar="FILE", help="draw it")


def _plan(args: argparse.Namespace) -> int:
    from jaxseek.config.run import is_run_file
    from jaxseek.lab.plan import plan

    if args.trace and not args.repeats:
        raise WrongUse("--trace is of a run: give --run too")
    if args.set and not is_run_file(args.model):
        raise WrongUse(f"--set changes a run file, and {args.model} is a model")
    check_outputs(args.plot, args.hlo, args.trace)
    layout = args.model, args.topology, args.mesh, args.workload, args.batch, args.context, args.weights
    run = {"lora": args.lora, "remat": args.remat, "repeats": args.repeats, "trace": args.trace}
    return plan(*layout, overrides=args.set, as_json=args.json, hlo=args.hlo, plot=args.plot, **run)


def _sweep(args: argparse.Namespace) -> int:
    from jaxseek.lab.sweep import sweep

    check_outputs(args.plot)
    layouts = args.model, args.topology, args.mesh, args.workload, args.batch, args.context, args.weights
    return sweep(*layouts, keep=args.keep, as_json=args.json, plot=args.plot)


def _placement(args: argparse.Namespace) -> None:
    from jaxseek.lab import replay

    check_outputs(args.save, args.place, args.plot)
    if args.source.endswith((".npz", ".npy")):
        if args.prompt or args.file or args.save:
            raise WrongUse(f"{args.source} is a trace already: -p, -f and --save are for a model")
        load = replay.read_load(args.source)
    else:
        from jaxseek.engine.sampling import Sampling
        from jaxseek.engine.text import encode

        prompts = read_prompts(args.prompt, args.file)
        model, tokenizer = load_model(args.source, args.mesh, args.dtype, quiet=args.json)
        ids = [[int(i) for i in p.split()] if tokenizer is None else encode(tokenizer, p) for p in prompts]
        stops = tuple(dict.fromkeys((*model.cfg.eos_ids, *(tokenizer.eos_ids if tokenizer else ()))))
        sampling = Sampling(args.max_new_tokens, args.temperature, stop_ids=stops)
        load = replay.record(model, ids, sampling, args.save)
    served = replay.compare(load, args.devices, args.redundant, args.nodes)
    if args.place:
        replay.keep(load, args.devices, args.redundant, args.nodes, args.place)
    replay.show(load, served, args.json, args.plot)
