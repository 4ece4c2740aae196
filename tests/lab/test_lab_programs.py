"""What the compiled programs of DeepSeek-R1's shipped layouts hold, where the TPU compiler is installed."""

import importlib.util

import pytest

from jaxseek.config.model import ModelConfig
from jaxseek.lab.compile import compile_job
from jaxseek.lab.hlo import read_program
from jaxseek.lab.plan import make_job
from jaxseek.lab.report import report

pytestmark = [
    pytest.mark.slow,  # seconds to compile, and no part of the default installation
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra lab"),
]
R1 = ModelConfig.from_preset("deepseek-r1")
LAYERS, DENSE = R1.num_hidden_layers, 3


@pytest.fixture(scope="module", params=[(8, 2048), (8, 8192), (128, 512), (128, 8192)], ids=str)
def decode(request):
    """The job, and its compiled step."""
    job, _ = make_job(R1, "v5e:8x8", None, "decode", *request.param, "int8")
    compiled = compile_job(job)
    return job, compiled, read_program(compiled.text)


def test_nothing_large_is_copied(decode):
    _, compiled, _ = decode
    assert compiled.memory["temp"] < 64 * 2**20
    assert compiled.peak < 15 * 2**30


def test_no_chip_gets_a_weight_or_the_logits_of_all_rows(decode):
    job, _, program = decode
    activations = 2 * job.batch * R1.hidden_size  # nothing wider is anybody's to have
    for op in program.ops:
        if op.kind != "collective" or op.times == 1:
            continue
        received = op.bytes * (len(op.groups[0]) if op.opcode == "all-gather" else 1)
        assert received <= activations, op
    logits = 4 * job.batch * R1.vocab_size
    once = [o for o in program.ops if o.kind == "collective" and o.times == 1]
    assert max(o.bytes * (len(o.groups[0]) if o.opcode == "all-gather" else 1) for o in once) <= logits / 8


def test_a_sparse_layer_has_five_collectives_and_six_kernels(decode):
    _, _, program = decode
    inside = [o for o in program.ops if o.times == LAYERS - DENSE]
    collectives = sorted(o.opcode for o in inside if o.kind == "collective")
    assert collectives == ["all-gather", "all-reduce", "all-reduce", "all-to-all", "all-to-all"]
    kernels = sorted(o.name.split(".")[0] for o in inside if o.kind == "pallas")
    assert kernels == ["chosen_experts", "decode_attention", "latents", "outputs", "queries", "router"]
    assert sum(o.kind == "xla" for o in inside) < 25


# Cycles of XLA's operations, and of the kernels by their estimates: what the layouts are shipped for.
MOST = {(8, 2048): 9e6, (8, 8192): 10e6, (128, 512): 26e6, (128, 8192): 30e6}


def test_a_step_takes_no_more_than_it_did(decode):
    job, compiled, _ = decode
    seconds = report(job, compiled).to_dict()["seconds"]
    cycles = (seconds["xla"] + seconds["pallas"]) * job.topology.chip.device.clock
    assert cycles < MOST[job.batch, job.context]
