"""Learning rates and batch sizes are those that the papers' recipes give by hand."""

import math

import jax
import jax.numpy as jnp
import pytest

from jaxseek.config.model import ConfigError
from jaxseek.config.run import RunConfig
from jaxseek.train.schedule import RAMP_SIZES, batch_rows, learning_rate


def run(steps, rate=1.0, batch=None, **schedule):
    return RunConfig.from_dict(
        {
            "objective": "pretrain",
            "model": "tiny-v3",
            "out": "out",
            "steps": steps,
            "data": {"train": ["corpus.txt"]},
            "optimizer": {"learning_rate": rate},
            "schedule": schedule,
            "batch": batch or {},
        }
    )


def rates(cfg, *steps):
    return [float(learning_rate(cfg.program)(s)) for s in steps]


def test_the_learning_rate_of_v3_is_the_papers():
    # Steps of a billion tokens: 2.2e-4 to 10T, a cosine to 2.2e-5 at 14.3T, 7.3e-6 from 14.633T to 14.8T.
    milestones = [10 / 14.8, 14.3 / 14.8, 14.633 / 14.8]
    cfg = run(14800, 2.2e-4, kind="v3", warmup=2000, milestones=milestones, final=0.1, last=7.3e-6 / 2.2e-4)
    got = rates(cfg, 0, 999, 1999, 9999, 10000, 12150, 14299, 14300, 14632, 14633, 14799)
    nearly = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * 4299 / 4300)) / 2
    expected = [1.1e-7, 1.1e-4, 2.2e-4, 2.2e-4, 2.2e-4, 1.21e-4, nearly, 2.2e-5, 2.2e-5, 7.3e-6, 7.3e-6]
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("first", "rate"), [(0.8, 4.2e-4), (0.6, 2.4e-4)], ids=["LLM and MoE", "V2"])
def test_multi_step_rates_are_those_of_the_llm_moe_and_v2_papers(first, rate):
    cfg = run(10000, rate, kind="multi_step", warmup=2000, milestones=[first, 0.9], factors=[0.316, 0.1])
    start = int(first * 10000)
    got = rates(cfg, 0, 1999, 2000, start - 1, start, 8999, 9000, 9999)
    factors = [1 / 2000, 1, 1, 1, 0.316, 0.316, 0.1, 0.1]
    assert got == pytest.approx([rate * f for f in factors], rel=1e-6)


def test_linear_and_cosine_fall_to_final_over_what_the_warm_up_leaves():
    for kind, middle in (("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)):
        got = rates(run(110, kind=kind, warmup=10, final=0.1), 0, 4, 9, 10, 60, 110)
        last = 1.0 if kind == "constant" else 0.1
        assert got == pytest.approx([0.1, 0.5, 1, 1, middle, last], rel=1e-6), kind
    # A quarter of the way, where the two differ.
    assert rates(run(110, kind="linear", warmup=10, final=0.0), 35) == pytest.approx([0.75])
    assert rates(run(110, kind="cosine", warmup=10, final=0.0), 35) == pytest.approx([(1 + 0.5**0.5) / 2])


def test_without_a_warm_up_the_first_step_is_at_full_rate():
    assert rates(run(100, 3e-4, kind="constant"), 0, 99) == pytest.approx([3e-4, 3e-4])


def test_a_traced_step_gives_the_same_rate():
    for kind in ("constant", "linear", "cosine", "multi_step"):
        rate = learning_rate(run(50, 1e-3, kind=kind, warmup=5).program)
        traced = jax.jit(jax.vmap(rate))(jnp.arange(50))
        assert traced.dtype == jnp.float32
        assert traced.tolist() == pytest.approx([float(rate(s)) for s in range(50)], rel=1e-6)


def test_the_batch_ramps_up_in_at_most_eight_sizes():
    # DeepSeek-V3: 3072 to 15360 sequences over the first 469B of 14.8T tokens.
    cfg = run(14800, batch={"size": 15360, "ramp_from": 3072, "ramp_until": 469 / 14800})
    rows = [batch_rows(cfg, s, 64) for s in range(600)]
    # 3072 + k 12288 / 7 to the nearest multiple of 64, each for 67 steps
    sizes = [3072, 4800, 6592, 8320, 10112, 11840, 13632, 15360]
    assert sorted(set(rows)) == sizes
    assert len(sizes) <= RAMP_SIZES
    assert rows == sorted(rows)
    assert [rows[s] for s in (0, 66, 67, 468, 469, 599)] == [3072, 3072, 4800, 13632, 15360, 15360]


def test_a_small_ramp_keeps_to_multiples_and_a_batch_without_one_is_constant():
    cfg = run(100, batch={"size": 8, "ramp_from": 1, "ramp_until": 0.5})
    assert {batch_rows(cfg, s, 4) for s in range(100)} == {4, 8}
    assert {batch_rows(cfg, s, 8) for s in range(100)} == {8}
    assert {batch_rows(run(100, batch={"size": 8}), s, 2) for s in range(100)} == {8}
    assert batch_rows(run(100, batch={"size": 8, "ramp_from": 2}), 0, 2) == 8  # ramp_until 0: no ramp


def test_a_batch_that_the_mesh_does_not_divide_is_an_error_with_both_numbers():
    with pytest.raises(ConfigError, match=r"batch.size is 10, expected a multiple of 4 .*such as 12"):
        batch_rows(run(100, batch={"size": 10}), 0, 4)
