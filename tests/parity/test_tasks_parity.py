"""The character tokenizer in transformers, also from a model that was saved, read back and exported."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from jaxseek.checkpoint import models
from jaxseek.config.model import ModelConfig
from jaxseek.model.deepseek import DeepSeek
from jaxseek.rl.arithmetic import character_tokenizer, demonstrations
from jaxseek.tokenizer.tokenizer import Tokenizer
from jaxseek_convert import convert

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

RAW = {  # one layer with experts; rows of the embedding to spare
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def assert_same(directory, ours):
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for record in demonstrations(200, shown=0.5, words="mixed"):
        text = record["prompt"] + record["response"]
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode_trusted(text)
        assert theirs.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (
        ours.pad_id,
        ours.bos_id,
        *ours.eos_ids,
    )
    assert len(theirs) == ours.vocab_size
    assert theirs("a5")["input_ids"] == ours.encode("a5")
    assert (
        theirs.decode([*theirs("4;8")["input_ids"], theirs.eos_token_id], skip_special_tokens=True) == "4;8"
    )


def test_the_character_tokenizer_has_the_same_ids_in_transformers(tmp_path):
    assert_same(tmp_path, character_tokenizer(tmp_path))


def test_an_exported_model_has_its_tokenizer_and_logits_in_transformers(tmp_path):
    tokenizer = character_tokenizer(tmp_path / "tokenizer")
    cfg = ModelConfig.from_hf(RAW | {"eos_token_id": tokenizer.eos_ids[0]})
    models.save(DeepSeek.init(cfg, dtype=jnp.float32), tmp_path / "saved", tokenizer)
    convert(tmp_path / "saved", tmp_path / "exported", to="hf", progress=False)
    for path in (tmp_path / "saved", tmp_path / "exported"):
        ours = Tokenizer.from_dir(path)
        assert ours is not None
        assert_same(path, ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto").eval()
        prompt = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")(
            "6-2*7=", return_tensors="pt"
        )
        expected = theirs(prompt["input_ids"]).logits.detach().numpy()
    logits = np.asarray(
        models.restore(tmp_path / "saved")(jnp.asarray(prompt["input_ids"].numpy(), jnp.int32))
    )
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
