"""DeepSeek LLM's scaling laws give the paper's numbers, and FLOPs agree with a count by hand."""

import json

import pytest

from jaxseek.cli.main import main
from jaxseek.config.model import ConfigError, ModelConfig, presets
from jaxseek.train.scaling import flops_per_token, nearest_preset, propose


@pytest.mark.parametrize(
    ("compute", "rate", "batch"),
    [(1e20, 9.860e-4, 1.017e6), (1e22, 5.545e-4, 4.588e6), (3e23, 3.624e-4, 13.96e6)],
)
def test_learning_rate_and_batch_follow_from_compute(compute, rate, batch):
    found = propose(compute)
    assert found["learning_rate"] == pytest.approx(rate, rel=1e-3)
    assert found["batch_tokens"] == pytest.approx(batch, rel=1e-3)


def test_model_scale_and_tokens_use_up_the_compute():
    found = propose(1e20)
    assert found["model_flops_per_token"] == pytest.approx(5.251e9, rel=1e-3)
    assert found["tokens"] == pytest.approx(1.9045e10, rel=1e-3)
    assert found["model_flops_per_token"] * found["tokens"] == pytest.approx(1e20, rel=1e-3)


def test_the_papers_own_models_have_its_flops_per_token():
    for name, flops, compute in (("7b", 4.2279e10, 8.456e22), ("67b", 4.9728e11, 9.946e23)):
        found = flops_per_token(ModelConfig.from_preset(f"deepseek-llm-{name}-base"), 4096)
        assert found == pytest.approx(flops, rel=1e-4)
        assert 2e12 * found == pytest.approx(compute, rel=1e-3)


def test_budgets_outside_the_fit_say_so():
    assert [propose(c)["fitted"] for c in (9e16, 1e17, 2e19, 2.1e19, 2e24)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert "below what the paper tried" in propose(1e16)["note"]
    assert propose(1e18)["note"] == ""
    assert "as the paper does up to 1e+24" in propose(1e22)["note"]
    assert "beyond the paper" in propose(1e25)["note"]
    for compute in (0, -1e20, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="expected FLOPs above 0"):
            propose(compute)


def test_the_nearest_preset_is_the_one_of_that_scale():
    assert nearest_preset(4.2279e10)[0] == "deepseek-llm-7b-base"
    assert nearest_preset(6e11)[0] == "deepseek-llm-67b-base"
    assert nearest_preset(1e6)[0].startswith("tiny-")


def test_mixtures_and_latent_attention_count_what_a_token_uses():
    cfg = ModelConfig.from_preset("deepseek-v3")
    # 36.7B active parameters without embeddings and head; 128 heads of 192 + 128, 61 layers, 4096 keys
    attention = 6 * 61 * 128 * (192 + 128) * 4096
    embeddings = 2 * 129280 * 7168
    assert flops_per_token(cfg, 4096) == 6 * (cfg.num_active_params() - embeddings) + attention


def test_every_preset_has_a_scale():
    for name in presets():
        assert flops_per_token(ModelConfig.from_preset(name), 4096) > 0, name


def test_info_prints_the_proposal(capsys):
    assert main(["info", "--compute", "1e20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["learning_rate"] == pytest.approx(9.86e-4, rel=1e-3)
    assert main(["info", "--compute", "1e20"]) == 0
    shown = capsys.readouterr().out
    for part in ("9.86e-04", "1.02M tokens", "5.25e+09", "19.0B", "extrapolated"):
        assert part in shown, shown
    with pytest.raises(SystemExit) as stop:
        main(["info", "--compute", "-1"])
    assert stop.value.code == 2
    assert "--compute: is '-1', expected a number above 0" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="expected FLOPs above 0"):
        propose(-1)
    assert main(["info", "deepseek-v3", "--compute", "1e20"]) == 2
    assert "leave MODEL out" in capsys.readouterr().err
