"""Training follows PyTorch's: the loss of each of 100 steps, against a plain loop over transformers' model.

Needs the extra `parity`. The loop shares nothing with jaxseek: weights written by save_pretrained, labels
shifted by transformers, torch's AdamW and clipping, and the learning rate by the formula as it is written.
Losses come out 4e-7 apart. A thousandth leaves room for experts that rounding flips (weights changed by 1e-6
move a loss by up to 6e-5); b2 of 0.96, norms that decay, or a warm-up one step off are 1e-2 apart.
"""

import json
import math

import numpy as np
import pytest

import jaxseek
from jaxseek.cli.main import main
from jaxseek.config.run import RunConfig
from jaxseek.train.batch import make_batch, to_devices
from jaxseek.train.loss import StepInputs
from jaxseek.train.optimizer import decays, make_optimizer
from jaxseek.train.pretrain import LanguageLoss
from jaxseek.train.step import init_state, make_step

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

STEPS, ROWS, LENGTH, VOCAB = 100, 4, 48, 128
RATE, FINAL, WARMUP, DECAY, BETAS, EPS, CLIP = 3e-3, 0.1, 10, 0.1, (0.9, 0.95), 1e-8, 1.0


@pytest.fixture
def one_thread():
    """Of torch: its threads wait for each other so busily that two are 20 times slower on work this small."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(family: str):
    import transformers as tf

    common = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": family == "llama",
        "initializer_range": 0.05,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if family == "llama":
        return tf.LlamaConfig(**common, num_key_value_heads=2, attention_bias=True)
    return tf.DeepseekV3Config(
        **common,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )


def rows_of_steps(packed: bool):
    """Tokens, segments (0 is padding) and weights of every step: a chain with noise, which can be learnt."""
    rng = np.random.default_rng(0)
    follows = rng.permutation(VOCAB)
    for _ in range(STEPS):
        tokens = rng.integers(0, VOCAB, (ROWS, LENGTH))
        for t in range(1, LENGTH):
            kept = rng.random(ROWS) < 0.8
            tokens[:, t] = np.where(kept, follows[tokens[:, t - 1]], tokens[:, t])
        segments = np.ones((ROWS, LENGTH), int)
        weights = np.ones((ROWS, LENGTH))
        weights[:, :4] = 0  # as a prompt, and of another length in every row
        for row in range(ROWS):
            weights[row, : rng.integers(2, 16)] = 0
            if packed:
                first, second = sorted(rng.integers(8, LENGTH, 2))
                segments[row, first:] = 2
                segments[row, second:] = 3 * (row % 2)  # a third example, or padding
        yield tokens, segments, weights * (segments > 0)


def losses_of_torch(reference, accumulation: int, packed: bool) -> list[float]:
    import torch

    matrices = [p for p in reference.parameters() if p.ndim > 1]
    others = [p for p in reference.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer, losses = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS), []
    reference.train()
    for s, (tokens, segments, weights) in enumerate(rows_of_steps(packed)):
        cosine = (1 + math.cos(math.pi * max(0, s - WARMUP) / (STEPS - WARMUP))) / 2
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (s + 1) / WARMUP) * (FINAL + (1 - FINAL) * cosine)
        labels = np.where(weights > 0, tokens, -100)
        starts = np.diff(segments, axis=1, prepend=-1) != 0
        labels[starts] = -100  # no token of one example predicts the next example's first
        index = np.arange(LENGTH)
        positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
        total, count = 0.0, (labels >= 0).sum()
        for part in np.split(np.arange(ROWS), accumulation):
            inputs = {"input_ids": tokens[part], "labels": labels[part]}
            if packed:  # by positions that start anew, transformers knows packed examples
                inputs["position_ids"] = positions[part]
            inputs = {name: torch.tensor(a) for name, a in inputs.items()}
            out = reference(**inputs, num_items_in_batch=torch.tensor(count), use_cache=False)
            out.loss.backward()
            total += out.loss.item()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def losses_of_jaxseek(folder, accumulation: int, packed: bool) -> list[float]:
    run = RunConfig.from_dict(
        {
            "objective": "pretrain",
            "model": str(folder),
            "out": "unused",
            "steps": STEPS,
            "data": {"train": ["unused"]},
            "optimizer": {
                "learning_rate": RATE,
                "weight_decay": DECAY,
                "b1": BETAS[0],
                "b2": BETAS[1],
                "eps": EPS,
                "clip": CLIP,
            },
            "schedule": {"kind": "cosine", "warmup": WARMUP, "final": FINAL},
            "loss": {"mtp": 0.0, "bias_speed": 0.0},
        }
    )
    model, _ = jaxseek.load(folder)
    optimizer = make_optimizer(run.program, decays(model))
    step = make_step(LanguageLoss(run.program, np.float32), optimizer)
    state, losses = init_state(model, optimizer), []
    for rows in rows_of_steps(packed):
        batch = to_devices(make_batch(*rows, modules=0, accumulation=accumulation), state.model)
        with state.model.on_mesh():
            state, aux = step(state, batch, StepInputs(np.float32(0)))
        losses.append(float(aux.metrics["loss"]))
    return losses


@pytest.mark.parametrize(
    ("family", "accumulation", "packed"),
    [("llama", 1, False), ("llama", 2, True), ("deepseek_v3", 1, False), ("deepseek_v3", 2, True)],
)
def test_every_loss_of_a_run_is_that_of_a_torch_loop(family, accumulation, packed, tmp_path, one_thread):
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
    with torch.no_grad():  # what starts at zero, or at one, would hide whether it is trained
        for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]:
            if name.endswith("bias") or "norm" in name:
                tensor.add_(0.02 * torch.randn_like(tensor))
    reference.save_pretrained(tmp_path)
    expected = np.array(losses_of_torch(reference, accumulation, packed))
    losses = np.array(losses_of_jaxseek(tmp_path, accumulation, packed))
    apart = np.abs(losses / expected - 1)
    assert expected[-1] < 0.7 * expected[0]
    assert apart.max() < 1e-3


def test_bench_train_compares_programs_that_do_the_same_work(capsys):
    argv = ["bench", "tiny-v3", "--train", "--rows", "1", "--length", "32", "--repeats", "2"]
    assert main([*argv, "--remat", "none", "full", "--against", "transformers", "--json"]) == 0
    *ours, theirs = json.loads(capsys.readouterr().out)["rows"]
    assert [row["remat"] for row in ours] == ["none", "full"]
    for row in ours:
        assert row["loss_difference"] < 1e-4
        assert row["speedup"] == row["tokens_per_second"] / theirs["tokens_per_second"]
