"""A model as a judge: its probability of yes against no at the end of the question."""

import dataclasses

import numpy as np
import pytest
import tokenizers
from oracles import random_model
from policies import POLICIES, make_home, trained

from jaxseek.checkpoint import models
from jaxseek.config.model import ConfigError
from jaxseek.rl import scorer
from jaxseek.rl.arithmetic import character_tokenizer
from jaxseek.rl.problem import Answer, Problem
from jaxseek.sharding.strategy import Strategy
from jaxseek.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

JUDGE = POLICIES["dense"].replace(max_position_embeddings=256)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """With a judge that has tokens for yes and no."""
    home = make_home(tmp_path_factory.mktemp("home"))
    tokenizer = character_tokenizer(home / "words")
    raw = tokenizers.Tokenizer.from_str((home / "words/tokenizer.json").read_text())
    raw.add_tokens(["yes", "No"])
    (home / "words/tokenizer.json").write_text(raw.to_str())
    models.save(random_model(JUDGE), home / "judge", Tokenizer.from_dir(home / "words"))
    assert tokenizer.token_id("yes") is None
    return home


def answers(count):
    return [Answer(Problem(f"{i}+{i}=", "0"), f"{i * i}", None, f"{i * i}", 1, "stop") for i in range(count)]


def test_the_reward_is_the_probability_of_yes_against_no(home):
    judge, some = scorer.Judge(Strategy.parse("fsdp=2")), answers(scorer.BATCH + 3)
    got = judge(str(home / "judge"), some)
    tokenizer = Tokenizer.from_dir(home / "judge")
    assert tokenizer is not None
    model, (yes, no) = random_model(JUDGE), (tokenizer.token_id("yes"), tokenizer.token_id("No"))
    for answer, score in zip(some, got, strict=True):
        text = scorer.QUESTION.format(question=answer.problem.prompt, reply=answer.final)
        logits_V = np.asarray(model(np.array([tokenizer.encode(text + "\nAnswer: ")]))[0, -1], np.float64)
        expected = np.exp(logits_V[yes]) / (np.exp(logits_V[yes]) + np.exp(logits_V[no]))
        np.testing.assert_allclose(score, expected, atol=1e-5)
    assert len({round(score, 4) for score in got}) > 5
    chat = dataclasses.replace(some[2].problem, prompt=[{"role": "user", "content": some[2].problem.prompt}])
    (same,) = judge(str(home / "judge"), [dataclasses.replace(some[2], problem=chat)])
    np.testing.assert_allclose(same, got[2], atol=1e-6)


def test_a_question_longer_than_the_judges_context_keeps_its_end(home):
    judge, (one,) = scorer.Judge(Strategy.parse("fsdp=1")), answers(1)
    scores = [
        judge(str(home / "judge"), [dataclasses.replace(one, final=f)])[0] for f in ("1" * 999, "1" * 998)
    ]
    assert all(0 < s < 1 for s in scores)


def test_a_tokenizer_without_yes_and_no_is_named(home):
    with pytest.raises(ConfigError, match='no single token for "yes"'):
        scorer.Judge(Strategy.parse("fsdp=1"))(str(home / "dense"), answers(1))


def test_a_run_learns_from_a_judge(home, tmp_path):
    rewards = [{"kind": "model", "model": str(home / "judge")}]
    (found,) = trained(home, tmp_path / "run", "dense", steps=1, rewards=rewards)
    assert 0 < found["reward_model"] < 1
    assert found["grad_norm"] > 0
