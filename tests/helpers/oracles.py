"""The model as its papers write it, in numpy float64, one sequence and one token at a time.

Nothing here is shared with the package but the configuration and the parameters, so that agreement means
something. Tiny models of every family, whose constants (norms, biases) are random too, stand at the end.
"""

import functools
import math
import zlib

import jax
import numpy as np
import pytest

from jaxseek.config.model import ModelConfig, RopeConfig
from jaxseek.model.deepseek import DeepSeek
from jaxseek.sharding.parameters import fill, parameters

# -------------------------------------------------------------------- pieces


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def rms_norm(x, weight, eps):
    return weight * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def mscale(factor, a):
    return 0.1 * a * math.log(factor) + 1 if factor > 1 else 1.0


def inverse_frequencies(rope, d):
    """f_i of every pair: plain, linear, YaRN (DeepSeek's form) or Llama 3."""
    i = np.arange(d // 2)
    f = rope.rope_theta ** (-2.0 * i / d)
    s, length = rope.factor, rope.original_max_position_embeddings
    if rope.rope_type == "linear":
        return f / s
    if rope.rope_type == "yarn":

        def corr(beta):
            return d * math.log(length / (2 * math.pi * beta)) / (2 * math.log(rope.rope_theta))

        low = max(math.floor(corr(rope.beta_fast)), 0)
        high = min(math.ceil(corr(rope.beta_slow)), d - 1)
        high = high + 0.001 if low == high else high
        ramp = np.array([min(max((j - low) / (high - low), 0), 1) for j in i])
        return (f / s) * ramp + f * (1 - ramp)
    if rope.rope_type == "llama3":
        out = []
        for fi in f:
            wavelength = 2 * math.pi / fi
            if wavelength > length / rope.low_freq_factor:
                out.append(fi / s)
            elif wavelength < length / rope.high_freq_factor:
                out.append(fi)
            else:
                t = length / wavelength - rope.low_freq_factor
                t /= rope.high_freq_factor - rope.low_freq_factor
                out.append((1 - t) * fi / s + t * fi)
        return np.array(out)
    return f


def rotate(rope, x, position, interleaved):
    """One vector at one position; pairs stay where they were."""
    d, out = len(x), np.empty(len(x))
    f = inverse_frequencies(rope, d)
    factor = 1.0
    if rope.rope_type == "yarn":
        factor = mscale(rope.factor, rope.mscale or 1.0)
        if rope.mscale and rope.mscale_all_dim:
            factor /= mscale(rope.factor, rope.mscale_all_dim)
    for i in range(d // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + d // 2)
        cos, sin = factor * math.cos(position * f[i]), factor * math.sin(position * f[i])
        out[a], out[b] = x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos
    return out


def rotate_all(rope, x, interleaved):
    """Vectors [T, ..., R] at positions 0, 1, ..."""
    flat = x.reshape(len(x), -1, x.shape[-1])
    rotated = [[rotate(rope, v, t, interleaved) for v in row] for t, row in enumerate(flat)]
    return np.array(rotated).reshape(x.shape)


def swiglu(w, x):
    gate, up = x @ w["gate_DF"], x @ w["up_DF"]
    if "gate_bias_F" in w:
        gate, up = gate + w["gate_bias_F"], up + w["up_bias_F"]
    return (silu(gate) * up) @ w["down_FD"] + w.get("down_bias_D", 0)


# -------------------------------------------------------------------- attention


def causal_attention(q, k, v, scale, keep):
    """One head: q [T, H], k [T, H], v [T, V], keep [T, T]."""
    scores = np.where(keep, scale * q @ k.T, -np.inf)
    return softmax(scores) @ v


def gqa(cfg, w, x):
    """Query head n uses key-value head n // (N / K)."""
    T, N, K, H = len(x), cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    q = (x @ w["q_DKGH"].reshape(-1, N * H) + w.get("q_bias_KGH", np.zeros(N * H)).reshape(-1)).reshape(
        T, N, H
    )
    k = (x @ w["k_DKH"].reshape(-1, K * H) + w.get("k_bias_KH", np.zeros(K * H)).reshape(-1)).reshape(T, K, H)
    v = (x @ w["v_DKH"].reshape(-1, K * H) + w.get("v_bias_KH", np.zeros(K * H)).reshape(-1)).reshape(T, K, H)
    if cfg.model_type == "qwen3":
        q, k = (rms_norm(x, w[f"{n}_head_norm.scale_D"], cfg.rms_norm_eps) for n, x in (("q", q), ("k", k)))
    q, k = rotate_all(cfg.rope, q, False), rotate_all(cfg.rope, k, False)
    keep = np.tril(np.ones((T, T), bool))
    heads = [
        causal_attention(q[:, n], k[:, n // (N // K)], v[:, n // (N // K)], H**-0.5, keep) for n in range(N)
    ]
    return np.concatenate(heads, axis=-1) @ w["o_KGHD"].reshape(N * H, -1) + w.get("o_bias_D", 0)


def mla(cfg, w, x):
    """Latent attention, expanded: every head has keys and values of its own."""
    T, N, C, P = len(x), cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_nope_head_dim
    cq = None
    if cfg.q_lora_rank:
        cq = rms_norm(x @ w["q_a_DQ"] + w.get("q_a_bias_Q", 0), w["q_norm.scale_D"], 1e-6)
        q = np.einsum("tq,qnh->tnh", cq, w["q_b_QNH"])
    else:
        q = np.einsum("td,dnh->tnh", x, w["q_DNH"])
    a = x @ w["kv_a_DA"] + w.get("kv_a_bias_A", 0)
    ckv = rms_norm(a[:, :C], w["kv_norm.scale_D"], 1e-6)
    qr = rotate_all(cfg.rope, q[..., P:], cfg.rope_interleave)
    kr = rotate_all(cfg.rope, a[:, C:], cfg.rope_interleave)
    scale = (P + cfg.qk_rope_head_dim) ** -0.5
    if cfg.rope.rope_type == "yarn" and cfg.rope.mscale_all_dim:
        scale *= mscale(cfg.rope.factor, cfg.rope.mscale_all_dim) ** 2
    keep = np.tril(np.ones((T, T), bool))
    if cfg.index_topk:
        keep = dsa_keep(cfg, {k[8:]: v for k, v in w.items() if k.startswith("indexer.")}, x, cq)
    out = []
    for n in range(N):
        k = np.concatenate([ckv @ w["k_b_NPC"][n].T, kr], axis=-1)
        q_n = np.concatenate([q[:, n, :P], qr[:, n]], axis=-1)
        out.append(causal_attention(q_n, k, ckv @ w["v_b_NHC"][n].T, scale, keep) @ w["o_NHD"][n])
    return sum(out) + w.get("o_bias_D", 0)


def dsa_keep(cfg, w, x, cq):
    """Which keys each query keeps: the min(index_topk, t + 1) best by the indexer's score."""
    T, N, H, R = len(x), cfg.index_n_heads, cfg.index_head_dim, cfg.qk_rope_head_dim
    q = np.einsum("tq,qnh->tnh", cq, w["q_b_QNH"])
    k = x @ w["k_DH"]
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
    k = k * w["k_norm_H"] + w["k_norm_bias_H"]
    q = np.concatenate([rotate_all(cfg.rope, q[..., :R], False), q[..., R:]], axis=-1)
    k = np.concatenate([rotate_all(cfg.rope, k[..., :R], False), k[..., R:]], axis=-1)
    weight = (x @ w["weights_DN"]) * N**-0.5 * H**-0.5
    keep = np.zeros((T, T), bool)
    for t in range(T):
        score = [sum(weight[t, j] * max(q[t, j] @ k[s], 0) for j in range(N)) for s in range(t + 1)]
        keep[t, np.argsort(-np.array(score), kind="stable")[: cfg.index_topk]] = True
    return keep


# -------------------------------------------------------------------- experts


def affinity(cfg, logits):
    """Scores of the router's logits [..., E]."""
    return 1 / (1 + np.exp(-logits)) if cfg.scoring_func == "sigmoid" else softmax(logits)


def route(cfg, logits_E, bias_E=None):
    """Chosen expert ids and their gates for one token."""
    E, G, K = len(logits_E), cfg.n_group, cfg.num_experts_per_tok
    s = affinity(cfg, logits_E)
    choice = s + (0 if bias_E is None else bias_E)
    if cfg.topk_method != "greedy" and G > 1:
        members = [range(g * E // G, (g + 1) * E // G) for g in range(G)]
        if cfg.topk_method == "noaux_tc":
            score = [sum(sorted(choice[list(m)])[-2:]) for m in members]
        else:
            score = [max(choice[list(m)]) for m in members]
        kept = np.argsort(-np.array(score), kind="stable")[: cfg.topk_group]
        choice = np.array([choice[e] if e // (E // G) in kept else -np.inf for e in range(E)])
    ids = np.argsort(-choice, kind="stable")[:K]
    gates = s[ids]
    if cfg.norm_topk_prob:
        gates = gates / (gates.sum() + 1e-20)
    return ids, gates * cfg.routed_scaling_factor


def expert(gate_DF, up_DF, down_FD, x):
    return (silu(x @ gate_DF) * (x @ up_DF)) @ down_FD


def moe(cfg, w, x):
    """Token by token, expert by expert, plus the shared experts: ([T, D], ids [T, K])."""
    y, all_ids = np.zeros_like(x), []
    for t, x_D in enumerate(x):
        ids, gates = route(cfg, x_D @ w["router_DE"], w.get("router_bias_E"))
        for e, g in zip(ids, gates):
            y[t] += g * expert(w["gate_EDF"][e], w["up_EDF"][e], w["down_EFD"][e], x_D)
        all_ids.append(ids)
    if cfg.n_shared_experts:
        y += swiglu({k[7:]: v for k, v in w.items() if k.startswith("shared.")}, x)
    return y, np.array(all_ids)


# -------------------------------------------------------------------- the decoder


def block(cfg, w, x):
    """One pre-norm layer: ([T, D], expert ids or None)."""
    attn = {k[5:]: v for k, v in w.items() if k.startswith("attn.")}
    mlp = {k[4:]: v for k, v in w.items() if k.startswith("mlp.")}
    attention = mla if cfg.is_mla else gqa
    x = x + attention(cfg, attn, rms_norm(x, w["attn_norm.scale_D"], cfg.rms_norm_eps))
    h = rms_norm(x, w["mlp_norm.scale_D"], cfg.rms_norm_eps)
    y, ids = moe(cfg, mlp, h) if "router_DE" in mlp else (swiglu(mlp, h), None)
    return x + y, ids


def weights(model):
    """Every parameter of a model by its path, float64."""
    return {path: np.asarray(p[...], np.float64) for path, p in parameters(model).items()}


def layers(w):
    """The parameters of each layer of the stacks, in order."""
    out = []
    while stack := {k.split(".", 2)[2]: v for k, v in w.items() if k.startswith(f"stacks.{len(out)}.")}:
        out.append([{k: v[l] for k, v in stack.items()} for l in range(len(stack["attn_norm.scale_D"]))])
    return [layer for stack in out for layer in stack]


def forward(cfg, w, tokens_T):
    """One sequence from position 0: logits [T, V], normed hidden states [T, D], ids [sparse layers, T, K]."""
    x, routed = w["embed_VD"][np.asarray(tokens_T)], []
    for layer in layers(w):
        x, ids = block(cfg, layer, x)
        routed += [ids] if ids is not None else []
    h = rms_norm(x, w["norm.scale_D"], cfg.rms_norm_eps)
    return h @ head(w), h, np.array(routed)


def head(w):
    return w["head_DV"] if "head_DV" in w else w["embed_VD"].T


def predict_ahead(cfg, w, tokens_T, depth=0):
    """Logits for t_{i+2+depth} of the multi-token modules 0..depth, one feeding the next."""
    tokens, eps = np.asarray(tokens_T), cfg.rms_norm_eps
    h = forward(cfg, w, tokens)[1]
    for k in range(depth + 1):
        m = {key.removeprefix(f"mtp.{k}."): v for key, v in w.items() if key.startswith(f"mtp.{k}.")}
        layer = {key.removeprefix("stack."): v[0] for key, v in m.items() if key.startswith("stack.")}
        e = rms_norm(w["embed_VD"][tokens[k + 1 :]], m["embed_norm.scale_D"], eps)
        u = e @ m["proj_2DD"][0] + rms_norm(h[:-1], m["hidden_norm.scale_D"], eps) @ m["proj_2DD"][1]
        h = rms_norm(block(cfg, layer, u)[0], m["norm.scale_D"], eps)
    return h @ head(w)


# -------------------------------------------------------------------- tiny models


def slow(*values):
    """A case of a parametrized test that is left out of the default run."""
    return pytest.param(*values, marks=pytest.mark.slow)


YARN = RopeConfig("yarn", 10000.0, 4.0, 16, 32.0, 1.0, 1.0, 1.0)
_DENSE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "dtype": "float32",
}
_MOE = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "rope_interleave": True,
}
_V1 = _DENSE | _MOE | {"model_type": "deepseek", "num_key_value_heads": 4}
_V2 = _DENSE | _MOE | _MLA | {"model_type": "deepseek_v2"}
_V3 = _V2 | {
    "model_type": "deepseek_v3",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope": YARN,
}
TINY = {
    "llama": _DENSE | {"rope": RopeConfig("llama3", 500.0, 8.0, 16)},
    "llama with biases": _DENSE
    | {"attention_bias": True, "mlp_bias": True, "rope": RopeConfig("linear", factor=4.0)},
    "qwen2": _DENSE | {"model_type": "qwen2", "attention_bias": True, "tie_word_embeddings": True},
    "qwen3": _DENSE | {"model_type": "qwen3", "head_dim": 16, "rms_norm_eps": 1e-5},
    "v1": _V1,
    "v1, every second layer": _V1 | {"moe_layer_freq": 2, "first_k_dense_replace": 0, "num_hidden_layers": 3},
    "v2-lite": _V2 | {"q_lora_rank": None},
    "v2": _V2
    | {
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 4.0,
        "attention_bias": True,
        "rope": RopeConfig("yarn", 10000.0, 4.0, 16, 32.0, 1.0, 0.707, 0.707),
    },
    "v3": _V3 | {"num_hidden_layers": 3, "num_nextn_predict_layers": 2},
    "v3, no dense layer": _V3 | {"first_k_dense_replace": 0},
    "v3.2": _V3 | {"model_type": "deepseek_v32", "index_n_heads": 3, "index_head_dim": 8, "index_topk": 4},
}


def tiny_config(name, **changes) -> ModelConfig:
    return ModelConfig(**(TINY[name] | changes))


def random_values(path, param, sharding):
    """For `fill`: no norm is one and no bias zero; the same on every mesh."""
    (shape, dtype), constant = (param.shape, param.dtype), param.get_metadata("fill")
    draw = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape).astype(np.float32)
    value = 0.3 * draw + (0 if constant is None else constant)
    return jax.make_array_from_callback(shape, sharding, lambda index: value[index].astype(dtype))


def random_model(cfg, mesh=None, dtype=np.float32) -> DeepSeek:
    model = DeepSeek.abstract(cfg, mesh, dtype)
    return fill(model, model.strategy.make_mesh(), random_values)


@functools.cache
def tiny_model(name) -> DeepSeek:
    return random_model(tiny_config(name))


@functools.cache
def tiny_weights(name):
    return weights(tiny_model(name))


def random_tokens(*shape, seed=0, vocab=64):
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


def assert_close(got, expected, tolerance):
    """Equal within a fraction of the largest expected magnitude."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    worst = np.abs(got - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-30)
    assert worst <= tolerance, (
        f"differs by {worst:.2e} of the largest value, expected at most {tolerance:.0e}"
    )
