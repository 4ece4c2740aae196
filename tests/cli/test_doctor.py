"""`jaxseek doctor` on healthy, broken and hanging installations, and on directories in place of buckets."""

import json
import os

import pytest

from jaxseek.cli import doctor, shared
from jaxseek.cli.main import main
from jaxseek.machine import accelerators
from jaxseek.machine.accelerators import Accelerator


@pytest.fixture
def instead(tmp_path, monkeypatch):
    """Puts a package of this name and content before the installed one, for the processes of a test."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path / "fake"), os.environ.get("PYTHONPATH", "")])
    )

    def put(name, content):
        (tmp_path / "fake" / name).mkdir(parents=True)
        (tmp_path / "fake" / name / "__init__.py").write_text(content)

    return put


@pytest.fixture
def tpu(monkeypatch):
    """A machine with a TPU, and a user who did not ask for the CPU."""
    monkeypatch.setattr(accelerators, "find_accelerators", lambda: [Accelerator("tpu", 1, "TPU v5e", ())])
    monkeypatch.setattr(doctor, "_metadata", lambda attribute: "")
    monkeypatch.setattr(shared, "_said", False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)


@pytest.fixture
def not_jax(monkeypatch):
    """Leaves JAX out of an examination, which takes seconds."""
    monkeypatch.setattr(doctor, "_devices", lambda report, accelerators, timeout: None)


def told(capsys, *argv):
    code = main(["doctor", *argv, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["ok"] else 1)
    return found, " ".join(p["what"] + " -> " + p["mend"] for p in found["problems"])


def test_a_sound_machine_has_no_problems_and_a_directory_is_left_as_it_was(capsys, tmp_path):
    found, problems = told(capsys, str(tmp_path))
    assert problems == ""
    assert found["facts"]["backend"] == "cpu"
    assert found["facts"]["packages"]["jax"]
    assert found["facts"]["buckets"] == [f"{tmp_path}: 0 entries, writable"]
    assert list(tmp_path.iterdir()) == []


def test_people_read_what_a_program_reads(capsys, not_jax):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "no problems found" in shown
    assert "compile cache" in shown
    assert main(["doctor", "nosuch://x"]) == 1
    assert "problem: nosuch://x cannot be used" in capsys.readouterr().out


def test_a_flax_that_does_not_import_is_a_finding_and_no_crash(capsys, instead):
    instead("flax", "raise AttributeError('hijax has no HiPrimitive')")
    found, problems = told(capsys)
    assert "import flax.nnx fails: AttributeError: hijax has no HiPrimitive" in problems
    assert found["facts"]["backend"] == "cpu"  # JAX itself is well


def test_a_jax_that_does_not_import_is_a_finding_and_no_crash(capsys, instead):
    instead("jax", "raise ImportError('jaxlib is too old')")
    found, problems = told(capsys)
    assert "import jax fails: ImportError: jaxlib is too old" in problems
    assert found["facts"]["backend"] is None


def test_a_jax_that_hangs_at_its_devices_is_stopped_and_the_holder_of_the_chip_named(
    capsys, instead, tpu, monkeypatch
):
    instead("jax", "import time\ndef local_devices(): time.sleep(600)\n")
    monkeypatch.setattr(accelerators, "holders", lambda chips: {41: "python train.py"})
    _, problems = told(capsys, "--timeout", "8")
    assert "no devices within 8 s: the TPU is held by process 41 (python train.py)" in problems


def test_a_process_that_dies_while_it_looks_for_devices_is_a_finding(capsys, instead):
    instead("jax", "import os\ndef local_devices(): os.abort()\n")
    assert "ended without an answer: exit code -6" in told(capsys)[1]


def test_packages_that_do_not_go_together_are_named_with_one_command(capsys, monkeypatch, not_jax):
    have = accelerators.installed
    monkeypatch.setattr(accelerators, "installed", lambda name: "0.7.2" if name == "jax" else have(name))
    _, problems = told(capsys)
    assert "flax needs jax" in problems
    assert "and 0.7.2 is installed -> pip install -U 'jax" in problems


def test_a_libtpu_with_wrong_gradients_is_a_problem_only_where_there_is_a_tpu(capsys, monkeypatch, tpu):
    have = {"jax": "0.10.2", "libtpu": "0.0.42.1"}
    installed = accelerators.installed
    monkeypatch.setattr(accelerators, "installed", lambda name: have.get(name) or installed(name))
    monkeypatch.setattr(accelerators, "expected_libtpu", lambda: "0.0.42")
    report = doctor.Report()
    doctor._libtpu(report, accelerators.find_accelerators())
    (problem,) = report.problems
    assert "issue 39025" in problem["what"]
    assert problem["mend"] == "pip install -U 'jax[tpu]==0.10.1'"
    report = doctor.Report()
    doctor._libtpu(report, [])
    assert not report.problems
    assert len(report.notes) == 1


@pytest.mark.parametrize(
    ("url", "why"),
    [("/dev/null/x", "Not a directory"), ("nosuch://bucket/x", "Protocol not known: nosuch")],
)
def test_a_bucket_that_cannot_be_used_is_a_problem(capsys, url, why, not_jax):
    _, problems = told(capsys, url)
    assert f"{url} cannot be used" in problems
    assert why in problems


def test_a_bucket_whose_library_is_missing_names_what_to_install(capsys, instead, not_jax):
    instead("gcsfs", "raise ImportError('no gcsfs')")
    assert "-> pip install gcsfs" in told(capsys, "gs://bucket/x")[1]


def test_a_compile_cache_that_cannot_be_written_is_a_problem(capsys, monkeypatch, tmp_path, not_jax):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
    _, problems = told(capsys)
    assert "compile cache" in problems
    assert "export JAX_COMPILATION_CACHE_DIR" in problems


def test_a_directory_that_was_deleted_is_a_problem(capsys, monkeypatch, tmp_path, not_jax):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    _, problems = told(capsys)
    assert "this directory has been deleted -> cd" in problems


def test_every_verb_says_once_on_stderr_that_the_tpu_is_unused(capsys, tpu, monkeypatch):
    monkeypatch.setattr(accelerators, "installed", {"jax": "0.12.0"}.get)
    for expected in (1, 0):  # once a process
        assert main(["info", "--list"]) == 0
        shown = capsys.readouterr()
        assert "tiny-v3" in shown.out
        lines = shown.err.splitlines()
        assert len(lines) == expected
    monkeypatch.setattr(shared, "_said", False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert main(["info", "--list"]) == 0
    assert capsys.readouterr().err == ""


def test_a_verb_that_computes_says_it_where_the_packages_fit_and_jax_is_on_the_cpu(capsys, tpu, monkeypatch):
    monkeypatch.setattr(accelerators, "installed", {"jax": "0.12.0", "libtpu": "0.0.50.1"}.get)
    monkeypatch.setattr(accelerators, "expected_libtpu", lambda: "0.0.50")
    assert main(["generate", "tiny-v3", "-p", "1 2", "-n", "1"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "TPU" in line]
    assert len(lines) == 1
    assert "1 TPU v5e chip here, but JAX computes on the CPU" in lines[0]
    assert "jaxseek doctor" in lines[0]
