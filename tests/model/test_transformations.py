"""A model within the caller's own transformations, and through pickle."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import assert_close, random_model, random_tokens, tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS_BT = random_tokens(2, 6)


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config("v3"))


def test_a_model_is_called_within_jit(model):
    expected = model(TOKENS_BT)
    assert_close(jax.jit(lambda tokens: model(tokens))(jnp.asarray(TOKENS_BT)), expected, 1e-6)
    assert_close(jax.jit(lambda: model(TOKENS_BT))(), expected, 1e-6)
    assert_close(nnx.jit(lambda m, tokens: m(tokens))(model, jnp.asarray(TOKENS_BT)), expected, 1e-6)


def test_gradients_are_taken_within_jit_and_on_the_mesh(model):
    inside = jax.jit(nnx.grad(lambda m: m(TOKENS_BT).sum()))(model)
    with model.on_mesh():
        around = nnx.grad(lambda m: m(TOKENS_BT).sum())(model)
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(around)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_a_transformation_without_a_mesh_is_told_the_way(model, transform):
    def call():
        if transform == "grad":
            return nnx.grad(lambda m: m(TOKENS_BT).sum())(model)
        return jax.vmap(lambda tokens: model(tokens[None])[0])(jnp.asarray(TOKENS_BT))

    with pytest.raises(RuntimeError, match=r"with model.on_mesh\(\)"):
        call()


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
def test_a_pickled_model_is_the_same_on_the_same_mesh(mesh):
    model = random_model(tiny_config("v3"), mesh=mesh)
    back = pickle.loads(pickle.dumps(model))
    assert back.mesh == model.mesh
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(back)):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)
