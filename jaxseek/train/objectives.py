"""Training by a run's objective: the table of recipes on rows of data. GRPO is in rl/recipe.py."""

from __future__ import annotations

import contextlib
import dataclasses
import math

from jaxseek.config.run import RunConfig
from jaxseek.train.distill import Distill, sampled_run
from jaxseek.train.dpo import Dpo
from jaxseek.train.pretrain import Pretrain
from jaxseek.train.sft import Sft
from jaxseek.train.start import Setup
from jaxseek.train.trainer import Recipe, Result, train_by

RECIPES = {"pretrain": Pretrain, "sft": Sft, "dpo": Dpo, "distill": Distill}


def train(run: RunConfig, deadline: float = math.inf) -> Result:
    """Train by the recipe of the run's objective; see `train_by`."""
    return train_by(open_recipe, run, deadline)


def open_recipe(setup: Setup, closing: contextlib.ExitStack) -> Recipe:
    """Make the recipe of a run; distillation by samples becomes SFT on them."""
    if setup.run.objective == "distill" and setup.run.distill.by == "samples":
        setup = dataclasses.replace(setup, run=sampled_run(setup))
    return RECIPES[setup.run.objective](setup, closing)
