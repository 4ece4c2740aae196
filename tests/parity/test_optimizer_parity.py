"""AdamW against torch.optim.AdamW: twenty steps in float32 with decay, a warm-up and a cosine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseek.config.run import RunConfig
from jaxseek.train.optimizer import make_optimizer
from jaxseek.train.schedule import learning_rate

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

STEPS = 20


def test_twenty_steps_are_those_of_torch():
    import torch

    cfg = RunConfig.from_dict(
        {
            "objective": "pretrain",
            "model": "tiny-v3",
            "out": "out",
            "steps": STEPS,
            "data": {"train": ["corpus.txt"]},
            "optimizer": {"learning_rate": 0.01, "weight_decay": 0.3},
            "schedule": {"kind": "cosine", "warmup": 5},
        }
    )
    rng = np.random.default_rng(0)
    shapes, decay = {"matrix": (16, 8), "bias": (8,)}, frozenset(["matrix"])
    first = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}

    theirs = {k: torch.nn.Parameter(torch.tensor(a)) for k, a in first.items()}
    given = cfg.optimizer
    groups = [{"params": [p], "weight_decay": given.weight_decay * (k in decay)} for k, p in theirs.items()]
    reference = torch.optim.AdamW(groups, betas=(given.b1, given.b2), eps=given.eps)
    optimizer, rate = make_optimizer(cfg.program, decay), learning_rate(cfg.program)
    ours = jax.tree.map(jnp.asarray, first)
    state, update = optimizer.init(ours), jax.jit(optimizer.update)

    for s in range(STEPS):
        grads = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
        for name, p in theirs.items():
            p.grad = torch.tensor(grads[name])
        for group in reference.param_groups:
            group["lr"] = float(rate(s))
        reference.step()
        updates, state = update(grads, state, ours)
        ours = {k: p + updates[k] for k, p in ours.items()}
        for name, p in theirs.items():
            np.testing.assert_allclose(ours[name], p.detach().numpy(), rtol=1e-6, atol=1e-6)
