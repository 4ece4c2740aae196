"""`jaxseek quickstart`: train a tiny DeepSeek-V3, teach it to think by GRPO and export it, in minutes.

The stages are in configs/runs/quickstart.toml; this runs them and shows the result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxseek.checkpoint.directory import kind_of
from jaxseek.config.model import configs_dir
from jaxseek.recipes.pipeline import Pipeline, run_pipeline
from jaxseek.storage.place import Place, place, write_bytes
from jaxseek.storage.untrusted import parse_json
from jaxseek.train.metrics import read_metrics

# Latest end of each stage, as a share of the time allowed.
SHARES = {"skill": 0.5, "habit": 0.65, "think": 0.9}


@dataclass(frozen=True)
class Quickstart:
    """Accuracy and thinking length on held-out problems before and after GRPO, paths, and three examples."""

    accuracy_before: float
    accuracy_after: float
    thinking_tokens_before: float
    thinking_tokens_after: float
    problems: int
    grpo_steps: int
    seconds: float
    seed: int
    checkpoint: str
    hf: str
    figure: str
    examples: list[dict[str, str]]

    def __str__(self) -> str:
        runs = configs_dir() / "runs"
        lines = ["", "The same problems before and after GRPO:"]
        for e in self.examples:
            lines += [f"  {e['prompt']} (right: {e['answer']})"]
            lines += [f"    {when:7} {e[when]}" for when in ("before", "after")]
        return "\n".join(
            [
                *lines,
                "",
                f"                  before    after   ({self.problems} problems it has never seen, greedy)",
                f"  accuracy        {self.accuracy_before:6.1%}   {self.accuracy_after:6.1%}",
                f"  thinking tokens {self.thinking_tokens_before:6.1f}   {self.thinking_tokens_after:6.1f}",
                "",
                f"{self.seconds:.0f} s; the curves are in {self.figure}",
                f"checkpoint: {self.checkpoint}   Hugging Face format: {self.hf}",
                "",
                "Next:",
                f'  jaxseek generate {self.checkpoint} -t 0 -p "6-2*7*3-2*7="   ask it yourself',
                f"  jaxseek train {runs / 'r1-tiny.toml'}   all stages of R1's training",
                f"  {runs / 'grpo-smollm2-gsm8k.toml'}   a real model; how to run it stands in it",
                "  notebooks/03_grpo_learns_to_think.ipynb   the same, step by step",
            ]
        )


def quickstart(
    out: str | Path = "runs/quickstart",
    seed: int = 0,
    minutes: float = 5.0,
    tell: Callable[[str], None] = print,
) -> Quickstart:
    """Run the quickstart into `out`, resuming what is there; stages are cut short to end within `minutes`.

    Raises ValueError if `minutes` is not above 0, KeyboardInterrupt if a signal stopped it, and as the stages
    do.
    """
    if minutes <= 0:
        raise ValueError(f"minutes is {minutes}, expected above 0")
    begin = time.monotonic()
    path = configs_dir() / "runs" / "quickstart.toml"
    pipeline = Pipeline.from_toml(path, [f"out={json.dumps(str(out))}", f"seed={seed}"])
    deadlines = {name: begin + 60 * minutes * share for name, share in SHARES.items()}
    result = run_pipeline(pipeline, deadlines, tell)
    if result.stopped:
        raise KeyboardInterrupt
    thinking = place(out) / "think"
    hf = place(out) / "hf"
    if kind_of(hf) is None:
        from jaxseek_convert.conversion import convert

        convert(thinking / "model", hf, to="hf", overwrite=True)
    figure = place(out) / "quickstart.png"
    write_bytes(figure, (thinking / "rewards.png").read_bytes())
    return _result(thinking, hf, figure, seed, time.monotonic() - begin)


def _result(thinking: Place, hf: Place, figure: Place, seed: int, seconds: float) -> Quickstart:
    files = sorted((thinking / "answers").glob("*.jsonl"), key=str)
    before, after = (_answers(path) for path in (files[0], files[-1]))
    # Prefer problems that were wrong before and are right after; otherwise keep their order.
    chosen = sorted(range(len(before)), key=lambda i: (before[i]["correct"], -after[i]["correct"]))[:3]
    examples = [
        {
            "prompt": before[i]["prompt"],
            "answer": before[i]["answer"],
            "before": before[i]["text"],
            "after": after[i]["text"],
        }
        for i in chosen
    ]
    measured = [r for r in read_metrics(thinking) if "eval_accuracy" in r]
    first, last = measured[0], measured[-1]
    return Quickstart(
        first["eval_accuracy"],
        last["eval_accuracy"],
        first["eval_thinking_tokens"],
        last["eval_thinking_tokens"],
        len(before),
        int(files[-1].stem),
        round(seconds, 1),
        seed,
        str(thinking / "model"),
        str(hf),
        str(figure),
        examples,
    )


def _answers(path: Place) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    return [parse_json(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line]
