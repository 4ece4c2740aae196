"""Greedy decoding by a form of the decode step, without an engine."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

CAPACITY = 256


@functools.partial(jax.jit, static_argnames="dtype")
def _prefill(model, tokens_BT, lengths_B, dtype):
    rules, decode = model.strategy.prefill, model.strategy.decode
    segments_BT = (jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]).astype(jnp.int32)
    caches = model.init_caches(len(tokens_BT), CAPACITY, dtype, rules)
    ctx = model.context(rules, tokens_BT, None, segments_BT, caches)
    out = model.forward(tokens_BT, ctx, caches)

    def as_in_decode(cache):
        heads = ("kv_heads",) if cache.ndim == 5 else ()
        return decode.shard(cache, None, "cache_batch", *heads, "cache_length", None)

    last_BT = (jnp.arange(tokens_BT.shape[1])[None] == lengths_B[:, None] - 1).astype(jnp.float32)
    hidden_BTD, last_BT = (
        rules.shard(out.hidden_BTD, "batch", None, None),
        rules.shard(last_BT, "batch", None),
    )
    last_BD = decode.shard(jnp.einsum("BTD,BT->BD", hidden_BTD, last_BT), "batch", None)
    return model.logits(last_BD[:, None], decode)[:, 0], jax.tree.map(as_in_decode, out.caches)


def decode(model, form, prompts, steps):
    """Greedy tokens [B, steps] of prompts, and the logits [B, steps, V] that each was taken from."""
    form = importlib.import_module(f"jaxseek.decode.{form}")
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    step = jax.jit(form.step)
    weights = form.prepare(model)
    with model.on_mesh():
        logits, caches = _prefill(model, tokens, lengths, "float32")
        caches, made, all_logits = form.split(caches), [], []
        shard = functools.partial(model.strategy.decode.shard)
        for i in range(steps):
            all_logits.append(np.asarray(logits))
            made.append(all_logits[-1].argmax(-1).astype(np.int32))
            if i + 1 < steps:
                position = shard(jnp.asarray(lengths + i), "batch")
                live = shard(jnp.ones(len(prompts), bool), "batch")
                out = step(weights, caches, shard(jnp.asarray(made[-1]), "batch"), position, live)
                logits, caches = out.logits_BV, out.caches
    return np.stack(made, 1), np.stack(all_logits, 1)
