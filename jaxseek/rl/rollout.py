"""Sampling answers from the policy that is trained: its own weights, laid out for decoding once a rollout."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseek.config.run import RunConfig
from jaxseek.engine.engine import Engine, Timing
from jaxseek.engine.request import EXPERTS, LOGPROBS, Request
from jaxseek.engine.request import Answer as Sampled
from jaxseek.engine.sampling import Sampling
from jaxseek.engine.text import encode
from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.weight import is_adapted, quantization
from jaxseek.rl.problem import Answer, Problem
from jaxseek.sharding.parameters import jit_sharing, parameters
from jaxseek.tokenizer import chat
from jaxseek.tokenizer.tokenizer import Tokenizer
from jaxseek.train import lora


@dataclass(frozen=True)
class Episode:
    """A sampled answer with all that its update needs. `thinking_tokens` stand before `</think>`."""

    prompt: list[int]
    sampled: Sampled
    answer: Answer
    thinking_tokens: int


class Sampler:
    """Samples groups of answers with the weights that `load` was given last."""

    def __init__(self, run: RunConfig, tokenizer: Tokenizer, dtype: Any):
        self.run, self.tokenizer, self.dtype = run, tokenizer, dtype
        self.think_end = tokenizer.token_id(chat.THINK_END)
        self.eos_ids: tuple[int, ...] = ()  # of the model and of its tokenizer
        self._engine: Engine | None = None

    def load(self, model: DeepSeek) -> float:
        """Take over the policy's weights; returns the seconds that laying them out for decoding took.

        Adapters are merged, and weights cast to the rollout's dtype; where nothing changes nothing is copied.
        """
        self._engine = None  # its weights go before the new ones are made
        start = time.perf_counter()
        self._engine = as_engine(model, self.dtype)
        self.eos_ids = tuple(dict.fromkeys((*model.cfg.eos_ids, *self.tokenizer.eos_ids)))
        jax.block_until_ready(jax.tree.leaves(self._engine.decoder.weights))
        return time.perf_counter() - start

    def free(self) -> None:
        """Let go of the weights."""
        self._engine = None

    def encode(self, problem: Problem) -> list[int]:
        """A problem's prompt as tokens. Raises TokenizerError where it does not fit the template."""
        if self.run.task.template == "r1_zero":
            return self.tokenizer.render_chat(problem.prompt, template="r1_zero")  # type: ignore[arg-type]
        return encode(self.tokenizer, problem.prompt)

    def sample(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[list[int]],
        seeds: Sequence[Sequence[int]],
        temperature: float,
        record_experts: bool = False,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> tuple[list[list[Episode]], Timing]:
        """An answer per problem and seed; temperature 0 is greedy, and knows no other filters.

        `progress` is told how many tokens there are, as they come.
        """
        engine, rollout = self._engine, self.run.rollout
        assert engine is not None, "load comes first"
        filters = (rollout.top_k, rollout.top_p, rollout.min_p)
        # An evaluation shares the rollout's program, unless that has filters: they sort the vocabulary.
        plain = Sampling(1, rollout.temperature, *filters).mode == "plain"
        filters = filters if temperature else (0, 1.0, 0.0)
        record = (LOGPROBS, EXPERTS) if record_experts else (LOGPROBS,)
        tokenizer = self.tokenizer if rollout.stop else None
        requests = [
            Request(
                prompt,
                Sampling(
                    rollout.max_new_tokens, temperature, *filters, seed=s, stop=tuple(rollout.stop),
                    stop_ids=self.eos_ids,
                ),
                tokenizer, record, special=True,
            )
            for prompt, group in zip(prompts, seeds) for s in group
        ]  # fmt: skip
        engine.mode, engine.timing = "plain" if plain else "greedy", Timing()
        engine.resize(at_a_time(self.run), rollout.max_prompt_tokens + rollout.max_new_tokens)
        sampled: dict[int, Sampled] = {}
        for index, answer in engine.run(requests):
            if isinstance(answer, ValueError):
                raise answer
            sampled[index] = answer
            progress(engine.timing.new_tokens)
        numbers = iter(range(len(requests)))
        return [
            [self._episode(problem, prompt, sampled[next(numbers)]) for _ in group]
            for problem, prompt, group in zip(problems, prompts, seeds)
        ], engine.timing

    def _episode(self, problem: Problem, prompt: list[int], sampled: Sampled) -> Episode:
        tokens = sampled.tokens
        said = tokens[:-1] if tokens and tokens[-1] in self.eos_ids else tokens
        text = self.tokenizer.decode(said, False)
        before, mark, after = text.partition(chat.THINK_END)
        opened = self.tokenizer.opened_think(prompt) or before.lstrip().startswith(chat.THINK)
        thinking = before.lstrip().removeprefix(chat.THINK) if mark else None
        final = after if mark else ("" if opened else text)
        if self.think_end is not None and self.think_end in tokens:
            count = tokens.index(self.think_end) - (tokens[0] == self.tokenizer.token_id(chat.THINK))
        else:
            count = len(self.tokenizer.encode(thinking, bos=False)) if thinking else 0
        answer = Answer(problem, text, thinking, final, len(tokens), sampled.finish_reason or "length")
        return Episode(prompt, sampled, answer, count)


def as_engine(model: DeepSeek, dtype: Any) -> Engine:
    """An engine with the policy's weights, adapters merged, cast, and laid out for decoding.

    Quantised weights stay as they are.
    """
    if quantization(model):
        return Engine(model, cache_dtype=dtype, owns=False)
    with model.on_mesh():  # what need not be changed are the policy's own arrays
        return Engine(as_in_decode(model, jnp.dtype(dtype).name), cache_dtype=dtype, owns=False)


def at_a_time(run: RunConfig) -> int:
    """Answers that a rollout, or an evaluation, decodes side by side."""
    answers = run.rollout.prompts * run.grpo.group_size
    return min(answers, run.rollout.slots or answers)


def seed_of(*parts: int) -> int:
    """A seed for each (run seed, step, problem, answer): the same whenever it is asked for, never shared."""
    high, low = np.random.SeedSequence([p % 2**63 for p in parts]).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)


def in_decode(model: DeepSeek, dtype: str) -> DeepSeek:
    """The model without adapters, cast, and laid out as decoding uses it, so that no step moves weights."""
    model = cast(lora.merged(model) if is_adapted(model) else model, dtype)
    rules, values = model.strategy.decode, []
    for param in parameters(model).values():
        value, axes = param.get_value(), param.get_metadata("axes")
        values.append(rules.shard(value, *(None,) * (value.ndim - len(axes)), *axes))
    return jax.tree.unflatten(jax.tree.structure(model), values)


as_in_decode = jit_sharing(in_decode)


def cast(model: DeepSeek, dtype: Any) -> DeepSeek:
    """The model in another dtype; its routers stay in float32, as the trainer computes them: rounded, they
    would send tokens to other experts."""
    values = [
        v.get_value() if path.rsplit(".", 1)[-1].startswith("router_") else v.get_value().astype(dtype)
        for path, v in parameters(model).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(model), values)
