"""A tiny GGUF file, as llama.cpp's convert_hf_to_gguf.py writes them, and the weights it stands for."""

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

D, N, K, H, F, L = 64, 4, 2, 16, 96, 2
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ċ Ċ", "Ġ Ġ", "1 2"]
WHOLE = "unmerged"  # a piece that no merges lead to
TOKENS = ["<|end|>", "<|start|>", *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES), WHOLE]
TAIL = [("<think>", USER_DEFINED), ("<|tail|>", CONTROL), ("[PAD0]", UNUSED), ("[PAD1]", UNUSED)]
TYPES = [CONTROL] * 2 + [1] * (len(TOKENS) - 2) + [kind for _, kind in TAIL]
V = len(TYPES)
MLP = ("ffn_gate", "ffn_up", "ffn_down")


def block(F):
    return {
        "attn_norm": ("input_layernorm", (D,)),
        "attn_q": ("self_attn.q_proj", (N * H, D)),
        "attn_k": ("self_attn.k_proj", (K * H, D)),
        "attn_v": ("self_attn.v_proj", (K * H, D)),
        "attn_output": ("self_attn.o_proj", (D, N * H)),
        "ffn_norm": ("post_attention_layernorm", (D,)),
        "ffn_gate": ("mlp.gate_proj", (F, D)),
        "ffn_up": ("mlp.up_proj", (F, D)),
        "ffn_down": ("mlp.down_proj", (D, F)),
    }


def metadata(arch="llama", F=F, **changes):
    """Keys and values; `changes` by the last part of a key, None leaves it out."""
    meta = {
        "general.architecture": arch,
        f"{arch}.block_count": L,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": D,
        f"{arch}.feed_forward_length": F,
        f"{arch}.attention.head_count": N,
        f"{arch}.attention.head_count_kv": K,
        f"{arch}.rope.freq_base": 50000.0,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.dimension_count": H,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS + [token for token, _ in TAIL],
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    for key, value in changes.items():
        names = [name for name in meta if name.rsplit(".", 1)[-1] == key]
        meta[names[0] if names else key.replace("__", ".")] = value
    return {name: value for name, value in meta.items() if value is not None}


def weights(tied=True, biases=(), F=F):
    """(GGUF name, Hugging Face name, array) of every tensor; norms hold few digits, so that 16 bits do."""
    rng = np.random.default_rng(0)
    rows = [("token_embd", "model.embed_tokens", (V, D)), ("output_norm", "model.norm", (D,))]
    rows += [] if tied else [("output", "lm_head", (V, D))]
    for layer in range(L):
        rows += [(f"blk.{layer}.{a}", f"model.layers.{layer}.{b}", s) for a, (b, s) in block(F).items()]
    for ours, theirs, shape in rows:
        array = rng.normal(size=shape) if len(shape) > 1 else rng.integers(1, 9, shape) / 4
        yield f"{ours}.weight", f"{theirs}.weight", array.astype(np.float32)
        if ours.rsplit(".", 1)[-1] in biases:
            yield f"{ours}.bias", f"{theirs}.bias", rng.normal(size=shape[:1]).astype(np.float32)


def interleave(rows, heads):
    """LlamaModel.permute of convert_hf_to_gguf.py: the two halves of every head, row by row in turn."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, kind="Q8_0", arch="llama", meta=None, extra=(), raw=None, order="<", **shape):
    """Writes the file; returns Hugging Face's tensors in float32, as exact as the quantisation left them.

    `raw` replaces what stands for a tensor (GGUF name to bytes and type), `extra` adds tensors.
    """
    import gguf
    from gguf.quants import dequantize, quantize

    endian = gguf.GGUFEndian.LITTLE if order == "<" else gguf.GGUFEndian.BIG
    writer = gguf.GGUFWriter(path, arch, endianess=endian)
    writer.kv_data[0].clear()
    for key, value in (metadata(arch, F=shape.get("F", F)) if meta is None else meta).items():
        add = {
            str: writer.add_string,
            float: writer.add_float32,
            bool: writer.add_bool,
            list: writer.add_array,
        }
        add.get(type(value), writer.add_uint32)(key, value)
    held = {}
    for ours, theirs, array in weights(**shape):
        matrix = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        data = quantize(array, matrix)
        held[theirs] = dequantize(data, matrix)
        for name, heads in (("attn_q.", N), ("attn_k.", K)):
            data = interleave(data, heads) if name in ours and arch == "llama" else data
        data, matrix = (raw or {}).get(ours, (data, matrix))
        writer.add_tensor(ours, data, raw_dtype=matrix)
    for name, array in extra:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held
