"""Eight simulated devices, strict types, and a compilation cache that outlives the run.

Most of the time goes into tracing and compiling small programs, so what makes that cheaper is set here; none
of it changes what a program means.
"""

import gc
import os
from pathlib import Path

import jaxlib.version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs compile in half the time with XLA's older way of emitting fused loops on CPU, which later releases
# do not have, and in a sixth less if they are not split into 32 parts to compile side by side: pytest's
# workers keep the cores busy already. An unknown flag would end the process.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if jaxlib.version.__version_info__ < (0, 11) else "")
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_traceback_in_locations_limit", 0)  # of every operation, in the lowered module


# pytest's workers take files in this order and then as they come, so that none is left with a long one at the
# end while the others have nothing to do.
LONGEST_FIRST = (
    *("grpo_loop", "train_loop", "meshes", "quant", "train_step", "lab", "convert_stream", "verify"),
    *("quickstart", "replicas", "pipeline", "rollout", "engine", "decode_kernels", "rewards", "convert"),
)


def pytest_collection_modifyitems(items: list) -> None:
    order = {f"test_{name}": i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module")
def quick_compilation():
    """Compile without most optimisations, which cost more time than these modules' tests take to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # a program takes hundreds of memory maps, of which a process has 65,530


@pytest.fixture
def undrawn(monkeypatch):
    """Draw no pictures at the end of a test's runs; runs made by module fixtures still draw theirs."""
    monkeypatch.setattr("jaxseek.train.pretrain.plot_loss", lambda out: None)
    monkeypatch.setattr("jaxseek.rl.recipe.plot_rewards", lambda out: None)


def pytest_collection_finish() -> None:
    """Tracing makes objects by the million: Python need not look through them, and all modules, as often."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
