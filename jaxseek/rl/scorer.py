"""A model as a judge: the reward is its probability of "yes" against "no" (R1 had V3 judge, in stage 3)."""

from __future__ import annotations

import math

from jaxseek.api import load
from jaxseek.config.model import ConfigError
from jaxseek.engine.engine import Engine
from jaxseek.engine.request import Request
from jaxseek.engine.sampling import Sampling
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
        self._loaded: dict[str, tuple[Engine, Tokenizer, tuple[int, int]]] = {}

    def __call__(self, path: str, answers: list[Answer]) -> list[float]:
        if path not in self._loaded:
            model, tokenizer = load(path, self.strategy)
            if tokenizer is None:
                raise ConfigError(f"rewards: the model {path} has no tokenizer, which a judge needs")
            yes, no = (_token(tokenizer, word, path) for word in ("yes", "no"))
            self._loaded[path] = Engine(model, BATCH), tokenizer, (yes, no)
        engine, tokenizer, words = self._loaded[path]
        longest, said = engine.model.cfg.max_position_embeddings - 1, Sampling(1, temperature=0.0)
        prompts = [_prompt(tokenizer, answer)[-longest:] for answer in answers]
        found = engine.answers([Request(prompt, said, watch=words) for prompt in prompts])
        return [1 / (1 + math.exp(min(no - yes, 700.0))) for ((yes, no),) in (a.watched for a in found)]


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
