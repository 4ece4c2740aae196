"""Run-file sections for reinforcement learning: the GRPO loss, rollouts, tasks and rewards.

Standard library only. Papers: DeepSeekMath (GRPO, arXiv:2402.03300), R1 (2501.12948), DAPO (2503.14476),
Dr. GRPO (2503.20783), GSPO (2507.18071), CISPO (MiniMax-M1, 2506.13585), RLOO (2402.14740),
REINFORCE++ (2501.03262).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class GrpoConfig:
    """`[grpo]`: the policy loss. `preset` sets the other keys to a paper's values; explicit keys override it.

    advantage      (r - `baseline`) / `scale`. `baseline`: mean of the group (GRPO), of the rest of the group
                   (leave_one_out: RLOO), or none. `scale`: standard deviation of the group, of the batch
                   after subtracting its mean (REINFORCE++), or none (Dr. GRPO).
    ratio          pi / pi_old per token, per sequence to the power 1/length (sequence_mean: GSPO), or per
                   sequence (sequence: as printed for R1).
    surrogate      `clip`: min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A); with `dual_clip` c > 1 at
                   least c A for A < 0. `cispo`: stop_gradient(clip(ratio, 1 - clip_low, 1 + clip_high))
                   A log pi.
    normalization  of the sum over tokens: by all tokens of the minibatch (token: DAPO), by each sequence's
                   tokens, then the number of sequences (sequence: GRPO), or by the constant sequences x
                   max_new_tokens (constant: Dr. GRPO).
    beta, kl       weight and estimator of KL(pi || reference), in the loss or subtracted from each token's
                   reward. k1 has no useful gradient in the loss and is rejected there.
    importance_cap truncated importance sampling: a factor min(pi_trainer / pi_rollout, cap) per token; 0 is
                   off.
    overlong       answers truncated at max_new_tokens are masked out (`overlong_mask`), or lose up to
                   `overlong_penalty` over the last fraction `overlong_buffer` of max_new_tokens (DAPO,
                   eq. 13).
    dynamic_sampling  replace groups whose rewards are all equal by newly sampled ones (DAPO).
    """

    preset: Literal["r1_zero", "r1", "deepseekmath", "dapo", "dr_grpo", "gspo", "cispo"] = "r1_zero"
    group_size: int = 16  # G
    baseline: Literal["group", "leave_one_out", "none"] = "group"
    scale: Literal["group", "batch", "none"] = "group"
    ratio: Literal["token", "sequence_mean", "sequence"] = "token"
    surrogate: Literal["clip", "cispo"] = "clip"
    normalization: Literal["token", "sequence", "constant"] = "sequence"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    beta: float = 0.001
    kl: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    importance_cap: float = 0.0
    overlong_mask: bool = False
    overlong_buffer: float = 0.0  # DAPO: 4096 of 20480 tokens
    overlong_penalty: float = 1.0
    dynamic_sampling: bool = False
    minibatches: int = 1  # optimizer steps per pass over a rollout
    epochs: int = 1  # passes over a rollout
    old_logprobs: Literal["rollout", "trainer"] = "rollout"  # pi_old: from sampling, or recomputed
    routing_replay: bool = False  # update with the experts chosen in the rollout


# Values printed in the papers, over the defaults above. R1's clip is 10 (R1 v2, Methods); R1-Zero's is not
# printed. Only CISPO's upper bound has an effect, and its value is not printed.
PRESETS: dict[str, dict[str, Any]] = {
    "r1_zero": {"group_size": 16, "beta": 0.001},
    "r1": {"group_size": 16, "beta": 0.001, "clip_low": 10.0, "clip_high": 10.0},
    "deepseekmath": {"group_size": 64, "beta": 0.04},
    "dapo": {
        "normalization": "token", "clip_high": 0.28, "beta": 0.0, "overlong_buffer": 0.2,
        "dynamic_sampling": True,
    },
    "dr_grpo": {"normalization": "constant", "scale": "none", "beta": 0.0},
    "gspo": {"ratio": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4, "beta": 0.0},
    "cispo": {"surrogate": "cispo", "normalization": "token", "clip_low": 1.0, "clip_high": 4.0, "beta": 0.0},
}  # fmt: skip


@dataclass(frozen=True)
class RolloutConfig:
    """`[rollout]`: sampling of answers from the current policy at each step.

    The optimised policy is the one at `temperature`; top_k, top_p and min_p make the sampling distribution
    differ from it, which `grpo.importance_cap` can correct. `slots` sequences are decoded at a time (0: all).
    Up to `reward_workers` processes compute rewards of kind math, python and code (0: one per CPU core).
    """

    prompts: int = 32  # questions per step
    max_prompt_tokens: int = 512
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    slots: int = 0
    stop: list[str] = field(default_factory=list)
    # dtype of weights and cache during sampling; default: compute_dtype
    dtype: Literal["", "float32", "bfloat16"] = ""
    record_experts: bool = False  # even without routing_replay, to count tokens routed differently
    reward_workers: int = 0


@dataclass(frozen=True)
class ReferenceConfig:
    """`[reference]`: the reference policy of the KL term (with grpo.beta above 0).

    A copy of the initial policy on the devices (`device`) or in host memory (`host`), or the policy without
    its adapters (`base`, for LoRA). The current policy replaces it every `replace_every` steps (R1: 400).
    """

    kind: Literal["device", "host", "base"] = "device"
    replace_every: int = 0


@dataclass(frozen=True)
class TaskConfig:
    """`[task]`: problems with verifiable answers.

    `arithmetic` (chains of `terms` digits with + - *, left to right, modulo 10) and `countdown` (reach a
    target with `terms` numbers) are generated; `gsm8k`, `math` and `jsonl` read [data], `jsonl` with the
    columns prompt and answer. `template` turns a problem into a prompt: as is (plain), as a user message
    (chat), or in R1-Zero's template (R1 paper, table 1).
    """

    kind: Literal["arithmetic", "countdown", "gsm8k", "math", "jsonl"] = "jsonl"
    template: Literal["plain", "chat", "r1_zero"] = "chat"
    system: str = ""  # system message, for chat
    instruction: str = ""  # appended to every problem
    terms: int = 6
    held_out: int = 500  # evaluation problems; never trained on
    temperature: float = 0.0  # for evaluation; 0 is greedy
    samples: int = 1  # per held-out problem


@dataclass(frozen=True)
class RewardConfig:
    """`[[rewards]]`: one term of the reward, which is their weighted sum; each is between 0 and 1.

    exact         the final answer equals the reference's text
    math          it is mathematically equal (math-verify)
    countdown     it is an expression of the given numbers that reaches the target
    format        `<think>...</think>` followed by an answer; with `tags` also `<answer>...</answer>`
    language      fraction of the words in the reasoning that are in `language`
    length        1 up to `target` tokens, falling to 0 at twice as many; favours short answers
    code          fraction of the problem's unit tests that the answer's code passes, in a sandbox: jaxseek's
                  own, or inside bubblewrap's (bwrap) or nsjail's namespaces where these are installed
    model         sigmoid of a reward model's score: a checkpoint's log-odds of `yes` over `no`, see docs
    python        `module:function`, which maps a list of answers to one number each, or None for an answer
                  to which it does not apply: the sum is over the terms that do
    """

    kind: Literal["exact", "math", "countdown", "format", "language", "length", "code", "model", "python"]
    weight: float = 1.0
    name: str = ""  # name in the metrics; default: kind
    seconds: float = 5.0  # time limit per answer
    tags: bool = False
    language: Literal["en", "zh"] = "en"
    target: int = 256
    megabytes: int = 512  # memory limit of the sandbox
    sandbox: Literal["", "bwrap", "nsjail"] = ""
    function: str = ""
    model: str = ""


@dataclass(frozen=True)
class RejectConfig:
    """`[reject]`: rejection sampling of an SFT set (R1 paper, section 2.3.3).

    Each of `problems` problems is answered grpo.group_size times. An answer is kept if it was not truncated
    and every reward in `keep` reaches its threshold ({exact = 1.0, language = 1.0}), up to `per_problem` per
    problem. `mix_count` examples from the sources `mix` are added.
    """

    problems: int = 1000
    keep: dict[str, float] = field(default_factory=dict)
    per_problem: int = 1
    mix: list[str] = field(default_factory=list)
    mix_count: int = 0


_MOST_ANSWERS = 1 << 20  # of a step


def rl_problems(run: Any) -> list[str]:
    """Return the problems of the reinforcement-learning sections of a RunConfig, as messages."""

    def value(dotted: str) -> Any:
        return operator.attrgetter(dotted)(run)

    grpo, rollout, task = run.grpo, run.rollout, run.task
    sequences = rollout.prompts * grpo.group_size
    least = {
        "grpo.group_size": 1 if grpo.baseline == "none" else 2, "grpo.minibatches": 1, "grpo.epochs": 1,
        "rollout.prompts": 1, "rollout.max_prompt_tokens": 1, "rollout.max_new_tokens": 1, "rollout.slots": 0,
        "rollout.reward_workers": 0, "reference.replace_every": 0, "reject.problems": 1,
        "reject.per_problem": 1, "reject.mix_count": 0, "task.terms": 2, "task.held_out": 1,
        "task.samples": 1,
    }  # fmt: skip
    above = ("grpo.clip_low", "grpo.clip_high", "grpo.beta", "grpo.importance_cap", "grpo.overlong_penalty",
             "task.temperature", "rollout.top_k")  # fmt: skip
    most = {
        "task.held_out": 1 << 20, "task.samples": 1 << 16, "task.terms": 1 << 10, "rollout.slots": 1 << 20,
        "grpo.minibatches": 1 << 16, "grpo.epochs": 1 << 16, "reject.mix_count": 1 << 24,
    }  # fmt: skip
    checks = [(value(n) >= m, f"{n} is {value(n)}, expected {m} or more") for n, m in least.items()]
    checks += [(value(n) <= m, f"{n} is {value(n)}, expected at most {m:,}") for n, m in most.items()]
    checks += [(value(n) >= 0, f"{n} is {value(n)}, expected 0 or more") for n in above]
    checks += [
        (
            sequences <= _MOST_ANSWERS,
            f"rollout.prompts x grpo.group_size = {sequences} answers a step, at most {_MOST_ANSWERS:,} fit",
        ),
        (
            sequences % max(1, grpo.minibatches * run.batch.accumulation) == 0,
            f"rollout.prompts x grpo.group_size = {sequences} answers are not divisible by grpo.minibatches "
            f"{grpo.minibatches} x batch.accumulation {run.batch.accumulation}",
        ),
        (
            not grpo.dual_clip or grpo.dual_clip > 1,
            f"grpo.dual_clip is {grpo.dual_clip}, expected 0 (off) or above 1",
        ),
        (
            0 <= grpo.overlong_buffer < 1,
            f"grpo.overlong_buffer is {grpo.overlong_buffer}, expected a part of max_new_tokens, 0 to 1",
        ),
        (rollout.temperature > 0, f"rollout.temperature is {rollout.temperature}, expected above 0"),
        (0 < rollout.top_p <= 1, f"rollout.top_p is {rollout.top_p}, expected above 0, up to 1"),
        (0 <= rollout.min_p <= 1, f"rollout.min_p is {rollout.min_p}, expected 0 to 1"),
        (
            not (grpo.kl == "k1" and grpo.kl_in == "loss" and grpo.beta),
            'grpo.kl = "k1" in the loss has a gradient that is zero on average; use k3, or kl_in = "reward"',
        ),
        (
            not (grpo.importance_cap and grpo.old_logprobs == "rollout"),
            'grpo.importance_cap compares the trainer with the rollout; it needs old_logprobs = "trainer"',
        ),
        (
            not (run.reference.kind == "base" and grpo.beta and not run.lora.rank),
            'reference.kind = "base" is the model without its adapters; set lora.rank, or use "device"',
        ),
        (
            not (run.reference.kind == "base" and run.reference.replace_every),
            "reference.replace_every replaces a copy; with reference.kind base there is none",
        ),
        (
            not any(v for name, v in vars(run.loss).items() if name.endswith("_balance")),
            "a balance loss is a mean over rows, which GRPO packs anew at every step; leave loss.*_balance 0",
        ),
        (bool(run.rewards), 'no [[rewards]] are given, expected one or more, such as kind = "exact"'),
        (task.template == "chat" or not task.system, 'task.system needs task.template = "chat"'),
        (
            len({r.name or r.kind for r in run.rewards}) == len(run.rewards),
            "two [[rewards]] have one name; give them names of their own",
        ),
    ]
    names = [reward.name or reward.kind for reward in run.rewards]
    checks += [
        (name in names, f"reject.keep names {name}, expected one of the rewards: {', '.join(names)}")
        for name in run.reject.keep
    ]
    for reward in run.rewards:
        wants = {"python": "function", "model": "model"}.get(reward.kind)
        if wants:
            checks.append((bool(getattr(reward, wants)), f"rewards: kind {reward.kind} needs {wants}"))
        for name, limit in (("seconds", 10**6), ("megabytes", 10**7), ("target", 2**31 - 1)):
            given = getattr(reward, name)
            checks.append(
                (0 < given <= limit, f"rewards: {name} is {given}, expected above 0, up to {limit:,}")
            )
    return [text for ok, text in checks if not ok]
