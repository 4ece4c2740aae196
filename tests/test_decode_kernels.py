"""A decode step's kernels, interpreted, against float64 numpy; then together on a mesh, against plain JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from oracles import (
    quick_compilation,  # noqa: F401
    slow,
)

from jaxseek.config.model import ModelConfig, configs_dir
from jaxseek.decode import fused as step
from jaxseek.decode import kernels
from jaxseek.engine.engine import Engine
from jaxseek.engine.sampling import Sampling
from jaxseek.experts.replicate import place_experts
from jaxseek.model import cache, dispatch, layer
from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.replicas import table as slot_table
from jaxseek.ops import decode_attention as decode_attention_module
from jaxseek.ops.chosen_experts import chosen_experts_mlp
from jaxseek.ops.decode_attention import combined, decode_attention
from jaxseek.ops.scaled import Scaled
from jaxseek.sharding.strategy import Strategy

LAYER = 1  # of stacks of two


class Draw:
    """float64 stacks, and what a kernel is given of them: float32, or int8 with a scale for each output."""

    def __init__(self, seed: int, quantised: bool):
        self.rng, self.quantised = np.random.default_rng(seed), quantised

    def rows(self, *shape):
        return self.rng.standard_normal(shape).astype(np.float32)

    def matrix(self, *shape, inputs):
        """A stack's numbers in this layer, and its argument; `inputs` are the axes that are summed over."""
        x = self.rng.standard_normal((2, *shape))
        if not self.quantised:
            return x[LAYER].astype(np.float32).astype(float), jnp.asarray(x, jnp.float32)
        scale = np.abs(x).max(axis=inputs, keepdims=True) / 127
        value, scale = np.round(x / scale).astype(np.int8), scale.astype(np.float32)
        return value[LAYER] * scale[LAYER].astype(float), Scaled(jnp.asarray(value), jnp.asarray(scale))


def normed(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def rotated(x, angle, interleaved):
    """Pairs as complex numbers, turned; the first parts come before the second ones."""
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (a + 1j * b) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def close(got, want):
    np.testing.assert_allclose(np.asarray(got, float), want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_what_stands_around_attention(quantised, interleaved):
    draw, (B, D, Q, C, R, N, P, V) = Draw(0, quantised), (3, 256, 40, 32, 8, 3, 16, 24)
    x, angle = draw.rows(B, D), draw.rng.uniform(0, 6, (B, R // 2))
    rope = (jnp.cos(angle), jnp.sin(angle))
    norm, q_norm, kv_norm = (1 + draw.rows(2, n) / 4 for n in (D, Q, C))
    q_a, q_a_given = draw.matrix(D, Q, inputs=1)
    kv_a, kv_a_given = draw.matrix(D, C + R, inputs=1)
    cq, latent = kernels.latents(
        x, norm, q_a_given, kv_a_given, kv_norm, rope, LAYER, (1e-5, 1e-6), interleaved, interpret=True
    )
    x = normed(x.astype(float), norm[LAYER], 1e-5)
    kv = x @ kv_a
    close(cq, x @ q_a)
    close(latent[:, :C], normed(kv[:, :C], kv_norm[LAYER], 1e-6))
    close(latent[:, C:], rotated(kv[:, C:], angle, interleaved))

    q_b, q_b_given = draw.matrix(Q, N, P + R, inputs=1)
    k_b, k_b_given = draw.matrix(N, P, C, inputs=3)
    queries = kernels.queries(
        cq, q_norm, q_b_given, k_b_given, rope, LAYER, 1e-6, interleaved, interpret=True
    )
    q = np.einsum("bq,qnh->nbh", normed(x @ q_a, q_norm[LAYER], 1e-6), q_b)
    close(queries[..., :C], np.einsum("nbp,npc->nbc", q[..., :P], k_b))
    close(queries[..., C:], rotated(q[..., P:], angle, interleaved))

    z = draw.rows(N, B, C)
    v_b, v_b_given = draw.matrix(N, V, C, inputs=3)
    o, o_given = draw.matrix(N, V, D, inputs=(1, 2))
    y = kernels.outputs(jnp.asarray(z), v_b_given, o_given, LAYER, interpret=True)
    close(y, np.einsum("nbc,nvc,nvd->bd", z.astype(float), v_b, o))


@pytest.mark.parametrize(("parts", "own_values", "slots"), [(1, False, 512), (1, True, 1500), (2, True, 512)])
def test_attention_sees_each_row_up_to_its_position(parts, own_values, slots):
    draw, (B, K, G, H, C, S) = Draw(1, False), (4, 2, 5, 24, 16, slots)
    q, keys, position = draw.rows(B, K, G, H), draw.rows(2, B, K, S, H), np.array([0, 127, 300, slots - 1])
    values = draw.rows(2, B, K, S, C) if own_values else None

    def part(keys, values, start):  # of the slots, on a chip of its own
        found = decode_attention(q, keys, values, LAYER, position, 0.3, C, start, interpret=True)
        return combined(*found, ("slots",) if parts > 1 else (), jnp.float32)

    if parts == 1:
        got = part(keys, values, 0)
    else:
        cut = jax.tree.map(lambda a: jnp.stack(jnp.split(a, parts, axis=3)), (keys, values))
        got = jax.vmap(part, axis_name="slots")(*cut, jnp.arange(parts) * S // parts)[0]
    values = keys[..., :C] if values is None else values
    for b, last in enumerate(position):
        seen, value = (a[LAYER, b, :, : last + 1].astype(float) for a in (keys, values))
        score = np.exp(0.3 * np.einsum("kgh,ksh->kgs", q[b].astype(float), seen))
        close(got[b], np.einsum("kgs,ksc->kgc", score / score.sum(-1, keepdims=True), value))


@pytest.mark.parametrize(
    "preset",
    ["deepseek-v3", *(slow(p) for p in ("deepseek-v2", "deepseek-v2-lite"))],
)
def test_router_chooses_as_the_papers_say(preset):
    cfg = ModelConfig.from_preset(preset)
    draw, (B, D, E, K) = Draw(2, False), (5, 128, cfg.n_routed_experts, cfg.num_experts_per_tok)
    x, y, norm = draw.rows(B, D), draw.rows(B, D), 1 + draw.rows(2, D) / 4
    w, w_given = draw.matrix(D, E, inputs=1)
    bias = draw.rows(2, E) / 10 if cfg.has_router_bias else None
    valid, first, held = np.array([1, 1, 0, 1, 1], bool), E // 2, E // 4
    given = (x, y, norm, w_given / 9, bias)
    got = kernels.router(*given, None, valid, LAYER, 1e-6, cfg, first, held, interpret=True)
    total, xn, logits, gates, ids, listed, count = (np.asarray(a) for a in got)
    want = x.astype(float) + y
    close(total, want)
    close(xn, normed(want, norm[LAYER], 1e-6))
    want = normed(want, norm[LAYER], 1e-6) @ w / 9
    close(logits, want)
    exp = np.exp(want - want.max(1, keepdims=True))
    score = 1 / (1 + np.exp(-want)) if cfg.scoring_func == "sigmoid" else exp / exp.sum(1, keepdims=True)
    touched = set()
    for b in range(B):
        choice = score[b] + (0 if bias is None else bias[LAYER])
        if cfg.topk_method != "greedy":
            groups = np.sort(choice.reshape(cfg.n_group, -1))
            best = groups[:, -2:].sum(1) if cfg.topk_method == "noaux_tc" else groups[:, -1]
            kept = np.argsort(-best)[: cfg.topk_group]
            choice = np.where(np.isin(np.arange(E) // (E // cfg.n_group), kept), choice, -np.inf)
        chosen = np.argsort(-choice)[:K]
        assert ids[b].tolist() == chosen.tolist()
        gate = np.zeros(E)
        gate[chosen] = score[b][chosen] * valid[b]
        gate /= gate.sum() + 1e-20 if cfg.norm_topk_prob else 1
        close(gates[b], gate * cfg.routed_scaling_factor)
        touched |= {int(e) - first for e in chosen if valid[b] and first <= e < first + held}
    assert listed[: count[0]].tolist() == (sorted(touched) or [0])

    # the same with slots, which an expert's tokens take in turn
    expert_LS = np.stack([draw.rng.permutation([*range(E), *draw.rng.integers(0, E, E // 2)]) for _ in "ab"])
    slots, S = slot_table(expert_LS), expert_LS.shape[1]
    got = kernels.router(*given, slots, valid, LAYER, 1e-6, cfg, S // 2, S // 4, interpret=True)
    assert (np.asarray(got[4]) == ids).all()
    want, turn, touched = np.zeros((B, S)), {}, set()
    for b in np.flatnonzero(valid):
        for e in ids[b].tolist():
            own = np.flatnonzero(expert_LS[LAYER] == e)
            slot = own[turn.get(e, 0) % len(own)]
            turn[e] = turn.get(e, 0) + 1
            want[b, slot] = gates[b, e]
            touched |= {int(slot) - S // 2} & set(range(S // 4))
    close(got[3], want)
    assert np.asarray(got[5])[: int(got[6][0])].tolist() == (sorted(touched) or [0])


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("rows", [5, 40])  # together, and an expert's own brought together
def test_chosen_experts_are_those_with_a_gate(quantised, rows):
    draw, (E, D, F) = Draw(3, quantised), (6, 32, 64)
    x, gates = draw.rows(rows, D), np.abs(draw.rows(rows, E))
    gates[draw.rng.random((rows, E)) < 0.5] = 0
    gates[:, 2] = 0  # none has it
    gates[:, 3] = 1  # all do: more than are brought together at a time
    named = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    made = {name: draw.matrix(*shape, inputs=2) for name, shape in named.items()}
    shared = {name: draw.matrix(*shape[1:], inputs=1) for name, shape in named.items()}
    given = [m for _, m in made.values()]
    y = chosen_experts_mlp(
        jnp.asarray(x), jnp.asarray(gates), *given, LAYER, 3.0, shared=[m for _, m in shared.values()],
        interpret=True,
    )  # fmt: skip

    def mlp(x, gate, up, down):
        h = x @ gate
        return (h / (1 + np.exp(-h)) * (x @ up)) @ down

    x = x.astype(float)
    want = mlp(x, *(m for m, _ in shared.values()))
    for e in range(E):
        want += gates[:, e : e + 1] * mlp(x, *(m[e] for m, _ in made.values()))
    close(y, want)


def tokens_of(model):
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 1]]
    return Engine(model, form="plain").generate(prompts, Sampling(temperature=0.0, max_new_tokens=3))


def tokens_by_kernels(model, monkeypatch):
    for module in (step, layer, dispatch, cache):  # prompts are written as on TPU too
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    called = set()
    for name in ("attention", "experts"):
        function = getattr(step, name)
        monkeypatch.setattr(step, name, lambda *a, f=function, n=name: called.add(n) or f(*a))
    with pltpu.force_tpu_interpret_mode():
        out = tokens_of(model)
    assert called == {"attention", "experts"}  # or nothing was shown
    return out


def small(**fields) -> ModelConfig:
    tiny = ModelConfig.from_preset("tiny-v3")
    sizes = {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        "hidden_size": 64,
        "vocab_size": 128,
    }
    sizes |= {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "initializer_range": 0.3,
    }
    return dataclasses.replace(tiny, **(sizes | fields))


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        slow("deepseek-v3.v5e-8x8.decode", {"data": 2, "tensor": 2}),
        slow("redundant", {"expert": 2, "tensor": 2}),
        slow("deepseek-v3.v5e-8x8.decode.many", {"expert": 2, "tensor": 2}),
        slow("spread", {"expert": 2, "context": 2}),
    ],
)
def test_a_step_in_kernels_is_the_step_in_plain_jax(monkeypatch, tmp_path, layout, sizes):
    path, cfg = configs_dir() / "meshes" / f"{layout}.toml", small()
    if layout == "redundant":
        many = (configs_dir() / "meshes" / "deepseek-v3.v5e-8x8.decode.many.toml").read_text()
        path = tmp_path / "redundant.toml"
        path.write_text(many.replace("[weights]", "[weights]\nredundant_experts = 4"))
    want, model = tokens_of(DeepSeek.init(cfg)), DeepSeek.init(cfg, Strategy.from_toml(path, **sizes))
    place_experts(model)
    found = tokens_by_kernels(model, monkeypatch)
    for a, b in zip(found, want):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    jax.clear_caches()  # programs compiled as for a TPU


@pytest.mark.parametrize("mesh", [None, slow("data=2,tensor=2")])
def test_keys_and_values_are_written_and_read_in_place(monkeypatch, mesh):
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 128, "initializer_range": 0.3}
    cfg = dataclasses.replace(ModelConfig.from_preset("tiny-llm"), **sizes)
    want = tokens_of(DeepSeek.init(cfg))
    called = []
    attend = decode_attention_module.decode_attention
    monkeypatch.setattr(
        decode_attention_module, "decode_attention", lambda *a: called.append(1) or attend(*a)
    )
    for module in (decode_attention_module, layer, cache):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    with pltpu.force_tpu_interpret_mode():
        found = tokens_of(DeepSeek.init(cfg, mesh))
    assert called
    for a, b in zip(found, want):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    jax.clear_caches()
