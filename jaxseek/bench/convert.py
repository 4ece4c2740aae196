"""Time the conversion of a synthetic checkpoint in DeepSeek-V3's shape, beside `cat` of the same files.

Every run reads the files from disk: their pages are first dropped from the system's page cache (Linux). Times
are those of whole processes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxseek.config.model import ConfigError, ModelConfig
from jaxseek.machine.terminal import table
from jaxseek_convert.files import Writer
from jaxseek_convert.numbers import BF16, F32
from jaxseek_convert.safetensors_io import Shards, bytes_of
from jaxseek_convert.table import hf_tensors

_V3 = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "bfloat16",
    "vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 4096, "moe_intermediate_size": 1024,
    "num_hidden_layers": 5, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 768, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 4096,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_THEIRS = """
import sys, time, torch, transformers
from jaxseek.machine.host_memory import peak_memory
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2])
print(peak_memory())
"""


def synthetic(folder: Path, gigabytes: float, shards: int) -> int:
    """Write a bfloat16 checkpoint of about `gigabytes` in about `shards` files; return its size in bytes."""
    specs, experts = {}, 16
    for experts in range(16, 4096, 2):  # both groups are equal, and each has enough experts for a token
        raw = _V3 | {"n_routed_experts": experts}
        tensors = hf_tensors(ModelConfig.from_hf(raw))
        specs = {n: (shape, F32 if n.endswith("_bias") else BF16) for n, shape in tensors.items()}
        if bytes_of(specs) >= gigabytes * 1e9:
            break
    layout = Shards(specs, bytes_of(specs) // shards + (32 << 20))
    folder.mkdir(parents=True)
    writer = Writer(folder, layout.files)
    for file, header in layout.headers.items():
        writer.write(file, 0, np.frombuffer(header, np.uint8))
    for i, (name, (file, start)) in enumerate(layout.place.items()):
        shape, dtype = specs[name]
        same = "embed_tokens" in name or "head" in name  # the multi-token module has copies of these
        numbers = np.random.default_rng(0 if same else i).standard_normal(shape, np.float32)
        writer.write(file, start, (0.02 * numbers).astype(dtype))
    writer.close()
    layout.write_index(folder)
    (folder / "config.json").write_text(json.dumps(_V3 | {"n_routed_experts": experts}))
    return bytes_of(specs)


def forget(folder: Path) -> None:
    """Drop the files from the system's page cache."""
    for file in folder.iterdir():
        with file.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench(
    gigabytes: float, shards: int, dtype: str | None, repeats: int, transformers: bool, parent: str
) -> dict[str, Any]:
    """Time each program, in turn; return median seconds, and the peak memory in bytes of all but cat."""
    with tempfile.TemporaryDirectory(prefix="jaxseek-bench-", dir=parent) as scratch:
        source, out = Path(scratch) / "hf", Path(scratch) / "out"
        size = synthetic(source, gigabytes, shards)
        files = sorted(map(str, source.glob("*.safetensors")))
        convert = [sys.executable, "-m", "jaxseek.cli", "convert", str(source), str(out), "--json"]
        commands: dict[str, Sequence[str]] = {
            "cat": ["cat", *files],
            "jaxseek convert": convert + (["--dtype", dtype] if dtype else []),
        }
        if transformers:
            commands["transformers load + save"] = [sys.executable, "-c", _THEIRS, str(source), str(out)]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        memory: dict[str, int] = {}
        for turn in range(repeats):
            for name, command in commands.items():
                shutil.rmtree(out, ignore_errors=True)
                forget(source)
                print(f"turn {turn + 1}/{repeats}: {name:30}", end="\r", file=sys.stderr, flush=True)
                start = time.perf_counter()
                stdout = subprocess.DEVNULL if name == "cat" else subprocess.PIPE
                run = subprocess.run(command, check=True, stdout=stdout, stderr=subprocess.DEVNULL)
                seconds[name].append(time.perf_counter() - start)
                if run.stdout:
                    last = json.loads(run.stdout.splitlines()[-1])
                    memory[name] = last if isinstance(last, int) else last["peak_memory_bytes"]
    print(" " * 60, end="\r", file=sys.stderr)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    return {"bytes": size, "files": len(files), "seconds": medians, "peak_memory_bytes": memory}


def bench_convert(
    gigabytes: float,
    shards: int,
    dtype: str | None,
    repeats: int,
    against: str | None,
    parent: str,
    as_json: bool,
) -> dict[str, Any]:
    """Time conversions in the directory `parent`, on the disk to be measured; prints and returns.

    Raises ConfigError for a directory that does not exist or has too little room.
    """
    if not Path(parent).is_dir():
        raise ConfigError(f"{parent}: no such directory; give one on the disk to be measured")
    if shutil.disk_usage(parent).free < 2.2e9 * gigabytes:
        raise ConfigError(f"{parent}: has not the room for {gigabytes:g} GB and its conversion")
    found = bench(gigabytes, shards, dtype, repeats, bool(against), parent)
    lines = {}
    for name, seconds in found["seconds"].items():
        speed = found["seconds"]["cat"] / seconds
        peak = found["peak_memory_bytes"].get(name)
        lines[name] = f"{seconds:.1f} s, {speed:.0%} of the speed of cat" + (
            f", peak {peak / 2**30:.2f} GiB" if peak else ""
        )
    if as_json:
        print(json.dumps(found))
    else:
        table(f"{found['bytes'] / 1e9:.2f} GB in {found['files']} files, read from the disk", lines)
    return found
