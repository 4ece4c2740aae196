"""Resolve what the notebooks' first cell changes in Colab, starting from the packages of Colab's images.

    python3.13 .ci/colab.py              resolve for the CPU, TPU and GPU runtimes, and install nothing
    python3.13 .ci/colab.py --install cpu        install it for the CPU runtime and generate with it

Each runtime is a fresh virtual environment with the versions in .ci/colab/, in which notebooks/first_cell.py
runs as it is printed. Fails unless jax, jaxlib and libtpu or the CUDA plugin belong together and the kernel
stays as it is.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNEL = (
    "ipykernel",
    "ipython",
    "jupyter-client",
    "jupyter-core",
    "jupyter-server",
    "pyzmq",
    "tornado",
    "traitlets",
)
SITE = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runtimes", nargs="*", default=["cpu", "tpu", "gpu"], metavar="cpu|tpu|gpu")
    parser.add_argument("--install", action="store_true", help="install, and generate with the tiny model")
    args = parser.parse_args()
    problems = [p for runtime in args.runtimes for p in examine(runtime, args.install)]
    print("\n".join(problems) or "\nthe kernel stays, and what JAX needs belongs together")
    return 1 if problems else 0


def examine(runtime: str, install: bool) -> list[str]:
    """Problems of a runtime; prints what the cell changes there."""
    image = read_image(ROOT / f".ci/colab/{runtime}.txt")
    with tempfile.TemporaryDirectory() as folder:
        python = make_image(Path(folder), image)
        checkout = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", ROOT, checkout], check=True)
        cell = (checkout / "notebooks/first_cell.py").read_text(encoding="utf-8")
        cell = re.sub(r'^REPO_URL = ".*"', f'REPO_URL = "file://{checkout}"', cell, flags=re.M)
        done = run_cell(Path(folder), python, cell, runtime, install)
        if install:
            after = {n: v for n, v in versions(python).items() if n != "jaxseek"}
            print(done.stdout, done.stderr[-600:], sep="")
            generate = [python, "-m", "jaxseek.cli", "generate", "tiny-v3", "-p", "1 2 3", "-n", "4"]
            subprocess.run(generate, check=True, cwd=folder)
        else:
            report = Path(folder) / "report.json"
            if not report.exists():
                return [f"{runtime}: pip could not resolve:\n{done.stderr[-2000:]}"]
            wanted = (item["metadata"] for item in json.loads(report.read_text())["install"])
            after = image | {name_of(m["name"]): m["version"] for m in wanted if m["name"] != "jaxseek"}
    print(f"\n{runtime}: of {len(image)} packages, the cell changes")
    for name in sorted(after):
        if image.get(name) != after[name]:
            print(f"    {name} {image.get(name, '(none)')} -> {after[name]}")
    return [f"{runtime}: {problem}" for problem in check(runtime, image, after)]


def check(runtime: str, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """List what must not be so."""
    problems = [f"{n} {before[n]} -> {after[n]}" for n in KERNEL if after.get(n) != before[n]]
    jax = after["jax"]
    if after["jaxlib"] != jax:
        problems.append(f"jaxlib {after['jaxlib']} with jax {jax}")
    if runtime == "gpu":
        for name in ("jax-cuda12-plugin", "jax-cuda12-pjrt"):
            if after[name] != jax:
                problems.append(f"{name} {after[name]} with jax {jax}")
    if runtime == "tpu":
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, f"jax=={jax}"]
            subprocess.run(pip, check=True, capture_output=True)
            sys.path.insert(0, str(next(Path(folder).glob("jax-*.whl"))))  # a wheel is a zip of packages
            needs = importlib.metadata.requires("jax") or []
            sys.path.pop(0)
        expected = next(
            m[1] for line in needs if (m := re.match(r"libtpu==([\d.]+?)(\.\*)?;", line.replace(" ", "")))
        )
        if not after["libtpu"].startswith(expected):
            problems.append(f"libtpu {after['libtpu']} with jax {jax}, which expects {expected}")
    return problems


def read_image(path: Path) -> dict[str, str]:
    lines = (line.split("==") for line in path.read_text().splitlines() if "==" in line)
    return {name_of(name): version for name, version in lines}


def make_image(folder: Path, image: dict[str, str]) -> str:
    """A virtual environment with these packages. CUDA's, which take gigabytes, are there by name only."""
    venv.create(folder / "image", with_pip=True)
    python = str(folder / "image/bin/python")
    real = [f"{n}=={v}" for n, v in image.items() if not n.startswith("nvidia-")]
    subprocess.run([python, "-m", "pip", "install", "-qq", "--no-deps", *real], check=True)
    for name, version in image.items():
        if name.startswith("nvidia-"):
            info = folder / "image" / SITE / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            (info / "RECORD").touch()
    return python


def run_cell(
    folder: Path, python: str, cell: str, runtime: str, install: bool
) -> subprocess.CompletedProcess:
    """Run the cell as Colab would; without `install`, pip only writes what it would do into report.json."""
    tools = folder / "bin"
    tools.mkdir()
    if runtime == "gpu":
        (tools / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0\n")
        (tools / "nvidia-smi").chmod(0o755)
    env = os.environ | {"COLAB_RELEASE_TAG": "test", "PATH": f"{tools}:{os.environ['PATH']}"}
    env |= {"COLAB_TPU_ADDR": "localhost"} if runtime == "tpu" else {}
    if not install:
        dry = f'"install", "--dry-run", "--report", "{folder}/report.json", '
        assert cell.count('"install", ') == 1
        cell = cell.replace('"install", ', dry)
    env.pop("PYTHONPATH", None)
    return subprocess.run([python, "-c", cell], env=env, capture_output=True, text=True, cwd=folder)


def versions(python: str) -> dict[str, str]:
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True
    )
    return {name_of(p["name"]): p["version"] for p in json.loads(listed.stdout)}


def name_of(package: str) -> str:
    return package.lower().replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
