"""A model as a judge: the reward is its probability of "yes" against "no" (R1 had V3 judge, in stage 3)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseek.api import load
from jaxseek.config.model import ConfigError
from jaxseek.engine.engine import fetch, read_prompts
from jaxseek.model.deepseek import DeepSeek
from jaxseek.rl.problem import Answer
from jaxseek.sharding.strategy import Strategy
from jaxseek.tokenizer.tokenizer import Tokenizer

QUESTION = (
    "Here are a question and a reply to it.\n\n[Question]\n{question}\n\n[Reply]\n{reply}\n\n"
    "Is the reply correct and helpful? Answer with yes or no."
)
BATCH = 16


class Judge:
    """Probabilities of "yes" for answers, by any checkpoint; each is loaded when it is first asked.

    Raises ConfigError for a model whose tokenizer has no single token for yes or no.
    """

    def __init__(self, strategy: Strategy):
        self.strategy = strategy
        self._loaded: dict[str, tuple[DeepSeek, Tokenizer, list[int]]] = {}

    def __call__(self, path: str, answers: list[Answer]) -> list[float]:
        if path not in self._loaded:
            model, tokenizer = load(path, self.strategy)
            if tokenizer is None:
                raise ConfigError(f"rewards: the model {path} has no tokenizer, which a judge needs")
            self._loaded[path] = model, tokenizer, [_token(tokenizer, word, path) for word in ("yes", "no")]
        model, tokenizer, words = self._loaded[path]
        prompts = [_prompt(tokenizer, answer)[-model.cfg.max_position_embeddings :] for answer in answers]
        out: list[float] = []
        for begin in range(0, len(prompts), BATCH):
            some = prompts[begin : begin + BATCH]
            out += _yes(model, some, words)[: len(some)].tolist()
        return out


def _prompt(tokenizer: Tokenizer, answer: Answer) -> list[int]:
    asked = answer.problem.prompt
    question = asked if isinstance(asked, str) else "\n".join(str(m["content"]) for m in asked)
    text = QUESTION.format(question=question, reply=answer.final.strip())
    if tokenizer.template is None:
        return tokenizer.encode(text + "\nAnswer: ")
    return tokenizer.render_chat([{"role": "user", "content": text}], thinking=False)


def _token(tokenizer: Tokenizer, word: str, path: str) -> int:
    for form in (word, word.capitalize()):
        ids = tokenizer.encode(form, bos=False)
        if len(ids) == 1:
            return ids[0]
    raise ConfigError(f'rewards: the tokenizer of {path} has no single token for "{word}"')


def _yes(model: DeepSeek, prompts: list[list[int]], words: list[int]) -> np.ndarray:
    rows = int(np.lcm(BATCH, model.strategy.parts(model.strategy.prefill, "batch")))
    length = 1 << (max(map(len, prompts)) - 1).bit_length()
    length += -length % model.strategy.parts(model.strategy.prefill, "length")
    tokens_BT, lengths_B = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
    for i, prompt in enumerate(prompts):
        tokens_BT[i, : len(prompt)], lengths_B[i] = prompt, len(prompt)
    with model.on_mesh():
        logits_BV = fetch(_last_logits(model, tokens_BT, lengths_B)).astype(np.float64)
    return 1 / (1 + np.exp(logits_BV[:, words[1]] - logits_BV[:, words[0]]))


@jax.jit
def _last_logits(model: DeepSeek, tokens_BT: Any, lengths_B: Any) -> jax.Array:
    dtype = jnp.dtype(model.embed_VD[...].dtype).name
    return read_prompts(model, tokens_BT, lengths_B, tokens_BT.shape[1], dtype)[1]
