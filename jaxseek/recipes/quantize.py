"""`jaxseek quantize`: measure the rounding error of a quantised checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseek.api import load
from jaxseek.config.model import ModelConfig
from jaxseek.machine.host_memory import free_memory
from jaxseek.model.deepseek import DeepSeek
from jaxseek.storage.place import place
from jaxseek.tokenizer.tokenizer import Tokenizer
from jaxseek_convert.conversion import opened, source_place
from jaxseek_convert.verify import float32_model

_WINDOW, _WINDOWS, _BATCH = 256, 16, 4  # tokens of a window, windows to read, windows of a batch


def rounding_error(src: str | Path, dst: str | Path, text: str | Path | None = None) -> dict[str, Any]:
    """Compare the models `dst` and `src` (anything `convert` takes) on the tokens of a text.

    Returns the perplexity of both, KL(src || dst) in nats per token (mean and 99th percentile), and the share
    of tokens with the same most likely token. The default text is Python's manual; a model without a
    tokenizer reads random tokens, for which no perplexity is given. Returns {"why": reason} if both models do
    not fit in memory, the text is too short, or several hosts have joined. Raises CheckpointError as `load`
    does, or OSError.
    """
    if jax.process_count() > 1:
        return {"why": f"the models are compared on one host, and this ran on {jax.process_count()}"}
    cfg = ModelConfig.from_hf(place(dst))
    if (need := 8 * cfg.num_params()) > (free := free_memory()):
        return {"why": f"both models in float32 take {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free"}
    other, tokenizer = load(dst)
    window = min(_WINDOW, cfg.max_position_embeddings)
    tokens = _tokens(tokenizer, cfg.vocab_size, text, window)
    if not len(tokens):
        return {"why": f"{text} has fewer than {window} tokens; give a longer text"}
    with source_place(src, place(dst)) as at:
        model = float32_model(opened(at, False), cfg.replace(num_nextn_predict_layers=0))
    parts = [_compare(model, other, batch) for batch in np.split(tokens, range(_BATCH, len(tokens), _BATCH))]
    nll, other_nll, kl, same = (np.concatenate([p[i].ravel() for p in parts]) for i in range(4))
    result = {
        "tokens": int(kl.size),
        "text": str(text) if text else "Python's manual" if tokenizer else "random tokens",
        "kl": float(kl.mean()),
        "kl_99": float(np.quantile(kl, 0.99)),
        "same_token": float(same.mean()),
    }
    if tokenizer is not None:
        result |= {"perplexity": math.exp(nll.mean()), "perplexity_quantized": math.exp(other_nll.mean())}
    return result


def _tokens(tokenizer: Tokenizer | None, vocabulary: int, text: str | Path | None, window: int) -> np.ndarray:
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, vocabulary, (_BATCH, window))
    if text is None:
        from pydoc_data.topics import topics

        words = "\n".join(topics[name] for name in sorted(topics))
    else:
        words = place(text).read_text(encoding="utf-8")
    ids = tokenizer.encode(words[: 64 * window * _WINDOWS])
    count = min(_WINDOWS, len(ids) // window)
    return np.array(ids[: count * window]).reshape(count, window)


def _compare(a: DeepSeek, b: DeepSeek, tokens_BT: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return [B, T - 1] arrays: both negative log-likelihoods, KL, and whether the top tokens agree."""
    return tuple(map(np.asarray, _terms(a(tokens_BT), b(tokens_BT), jnp.asarray(tokens_BT))))


@jax.jit
def _terms(a_BTV: jax.Array, b_BTV: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, ...]:
    p, q = (jax.nn.log_softmax(x[:, :-1], axis=-1) for x in (a_BTV, b_BTV))
    next_BT1 = tokens_BT[:, 1:, None]
    nll, other = (-jnp.take_along_axis(x, next_BT1, axis=-1)[..., 0] for x in (p, q))
    return nll, other, (jnp.exp(p) * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).astype(jnp.float32)
