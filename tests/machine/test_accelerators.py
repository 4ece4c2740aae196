"""Accelerators found on simulated file systems, and what is said where JAX does not use them."""

import os

import pytest

from jaxseek.machine import accelerators
from jaxseek.machine.accelerators import Accelerator, driver_problem, find_accelerators, unused_accelerator

TPU = Accelerator("tpu", 4, "TPU v5e", ())


def pci(root, slot, vendor, device, kind):
    folder = root / "sys/bus/pci/devices" / slot
    folder.mkdir(parents=True)
    for name, value in (("vendor", vendor), ("device", device), ("class", kind)):
        (folder / name).write_text(value + "\n")


def files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return tuple(root / name for name in names)


@pytest.fixture
def versions(monkeypatch):
    """Installed versions by name, for a test to set; a jax that names libtpu 0.0.50 for its tpu extra."""
    have = {"jax": "0.12.0", "jaxlib": "0.12.0"}
    monkeypatch.setattr(accelerators, "installed", have.get)
    monkeypatch.setattr(accelerators, "expected_libtpu", lambda: "0.0.50")
    return have


def test_a_machine_without_accelerators_has_none_though_its_network_card_is_googles(tmp_path):
    assert find_accelerators(tmp_path) == []
    pci(tmp_path, "0000:00:04.0", "0x1ae0", "0x0042", "0x020000")
    pci(tmp_path, "0000:00:05.0", "0x1ae0", "0x001f", "0x010802")
    files(tmp_path, "dev/null", "dev/accel/accel0", "dev/vfio/7")
    assert find_accelerators(tmp_path) == []


@pytest.mark.parametrize("names", [("dev/accel0", "dev/accel1"), ("dev/vfio/0", "dev/vfio/1")])
def test_tpu_chips_are_counted_on_the_bus_and_named(tmp_path, names):
    pci(tmp_path, "0000:00:04.0", "0x1ae0", "0x0063", "0x120000")
    pci(tmp_path, "0000:00:04.1", "0x1ae0", "0x0063", "0x120000")  # a second function of the same chip
    pci(tmp_path, "0000:00:05.0", "0x1ae0", "0x0063", "0x120000")
    devices = files(tmp_path, *names)
    files(tmp_path, "dev/vfio/vfio")
    (found,) = find_accelerators(tmp_path)
    assert found == Accelerator("tpu", 2, "TPU v5e", devices)
    assert str(found) == "2 TPU v5e chips"


def test_a_chip_too_new_to_have_a_name_here_and_one_in_a_container_without_sys_are_found(tmp_path):
    pci(tmp_path / "new", "0000:00:04.0", "0x1ae0", "0x00ff", "0x120000")
    assert str(find_accelerators(tmp_path / "new")[0]) == "1 TPU chip"
    files(tmp_path / "container", "dev/accel0")
    assert str(find_accelerators(tmp_path / "container")[0]) == "1 TPU chip"


def test_gpus_are_found_with_and_without_their_driver(tmp_path):
    pci(tmp_path, "0000:01:00.0", "0x10de", "0x2330", "0x030200")
    pci(tmp_path, "0000:01:00.1", "0x10de", "0x22ba", "0x040300")  # its sound
    (found,) = find_accelerators(tmp_path)
    assert (found.kind, found.count, found.devices) == ("gpu", 1, ())
    assert "driver is not loaded" in driver_problem(found)[0]
    devices = files(tmp_path, "dev/nvidia0", "dev/nvidiactl")
    assert find_accelerators(tmp_path) == [Accelerator("gpu", 1, "NVIDIA", devices[:1])]


@pytest.mark.parametrize(
    ("libtpu", "why"),
    [
        (None, "libtpu is not installed"),
        ("0.0.21.1", "libtpu 0.0.21.1 is older than jax 0.12.0 expects (0.0.50)"),
    ],
)
def test_a_tpu_without_the_libtpu_of_its_jax_is_named_with_the_command(versions, libtpu, why):
    if libtpu:
        versions["libtpu"] = libtpu
    what, mend = unused_accelerator([TPU], environment={})
    assert what == f"4 TPU v5e chips here, but JAX would compute on the CPU: {why}"
    assert mend == "pip install 'jax[tpu]==0.12.0'"


def test_a_release_with_a_wrong_libtpu_is_never_the_advice(versions):
    for release, better in (("0.10.2", "0.10.1"), ("0.11.2", "0.12.0"), ("0.11.1", "0.11.1")):
        versions["jax"] = release
        assert driver_problem(TPU)[1] == f"pip install 'jax[tpu]=={better}'"


def test_a_gpu_needs_the_plugin_of_exactly_its_jaxlib(versions, tmp_path):
    gpu = Accelerator("gpu", 1, "NVIDIA", files(tmp_path, "dev/nvidia0"))
    assert driver_problem(gpu) == ("JAX's CUDA plugin is not installed", "pip install 'jax[cuda12]==0.12.0'")
    versions["jax-cuda13-plugin"] = "0.7.2"
    why, mend = driver_problem(gpu)
    assert why == "jax-cuda13-plugin 0.7.2 is not used with jaxlib 0.12.0"
    assert mend == "pip install 'jax[cuda13]==0.12.0'"
    versions["jax-cuda13-plugin"] = "0.12.0"
    assert driver_problem(gpu) is None
    assert unused_accelerator([gpu], environment={}) is None


def test_nothing_is_said_where_the_user_chose_or_jax_uses_the_chips(versions, tmp_path):
    gpu = Accelerator("gpu", 1, "NVIDIA", ())
    assert unused_accelerator([TPU], environment={"JAX_PLATFORMS": "cpu"}) is None
    assert unused_accelerator([TPU], backend="tpu", environment={}) is None
    assert unused_accelerator([gpu], environment={"CUDA_VISIBLE_DEVICES": ""}) is None
    assert unused_accelerator([], environment={}) is None


def test_a_chip_that_jax_could_not_start_is_reported_though_the_packages_fit(versions, tmp_path):
    versions["libtpu"] = "0.0.50.1"
    assert unused_accelerator([TPU], environment={}) is None
    what, mend = unused_accelerator([TPU], backend="cpu", environment={})
    assert "JAX computes on the CPU" in what
    assert mend == "jaxseek doctor"


def test_the_processes_that_hold_a_chip_are_named(tmp_path):
    (device,) = files(tmp_path, "dev/accel0")
    for pid, target in ((41, device), (42, "/dev/null")):
        folder = tmp_path / f"proc/{pid}/fd"
        folder.mkdir(parents=True)
        os.symlink(target, folder / "3")
        (folder.parent / "cmdline").write_bytes(b"python\0train.py\0")
    held = accelerators.holders(Accelerator("tpu", 1, "TPU v5e", (device,)), tmp_path)
    assert held == {41: "python train.py"}


def test_the_libtpu_of_the_installed_jax_is_read_from_its_metadata():
    assert len(accelerators.numbers(accelerators.expected_libtpu())) >= 3
