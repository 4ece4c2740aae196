# In Colab this installs jaxseek for the runtime (TPU, GPU or CPU); elsewhere it only checks that it is there.
REPO_URL = ""  # https://github.com/OWNER/NAME; written by notebooks/fill_in.py


def set_up():
    import importlib.metadata
    import importlib.util
    import json
    import os
    import shutil
    import subprocess
    import sys
    import tempfile
    from pathlib import Path

    def run(*command):
        return subprocess.run(command, capture_output=True, text=True)

    def name_of(package):
        return package.lower().replace("_", "-")

    def versions():
        importlib.invalidate_caches()
        return {name_of(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}

    def extra_for_runtime():
        devices = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
        if devices or {"COLAB_TPU_ADDR", "TPU_ACCELERATOR_TYPE", "TPU_NAME"} & os.environ.keys():
            return "tpu"
        return "cuda" if shutil.which("nvidia-smi") and run("nvidia-smi", "-L").returncode == 0 else ""

    def install(extra):
        """Install jaxseek, and JAX together with the libtpu or the plugin of its release."""
        if not REPO_URL:
            raise RuntimeError("REPO_URL is empty: put the address of this notebook's repository there")
        before, pins = versions(), Path(tempfile.mkdtemp()) / "constraints.txt"
        kernel = (
            "ipykernel ipython ipywidgets jupyter-client jupyter-core jupyter-server pyzmq tornado traitlets"
        )
        for kept in (
            f"{kernel} numpy",
            kernel,
        ):  # numpy changes only if no JAX that would do fits the one here
            pins.write_text("".join(f"{p}=={before[p]}\n" for p in kept.split() if p in before))
            package = f"jaxseek{f'[{extra}]' if extra else ''} @ git+{REPO_URL}"
            pip = run(sys.executable, "-m", "pip", "install", "-q", "-c", str(pins), package)
            if pip.returncode == 0:
                break
        else:
            raise RuntimeError(f"pip install '{package}' failed:\n{pip.stderr[-3000:]}")
        after = versions()
        changed = {p: f"{v} -> {after.get(p)}" for p, v in before.items() if after.get(p) != v}
        print("changed:", ", ".join(f"{p} {v}" for p, v in sorted(changed.items())) or "nothing")
        packages = importlib.metadata.packages_distributions()
        used = {name_of(p) for m in {m.partition(".")[0] for m in sys.modules} for p in packages.get(m, [])}
        if stale := sorted(used & changed.keys()):
            raise RuntimeError(
                f"{', '.join(stale)} changed while in use: Runtime > Restart session, and run this cell again"
            )

    in_colab = "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ
    package = importlib.util.find_spec("jaxseek")
    if package is None or package.origin is None:  # a clone's folder of that name is no installation
        if not in_colab:
            raise RuntimeError("jaxseek is not installed: pip install -e '.[notebooks]' in a clone of it")
        install(extra_for_runtime())
    if in_colab:  # in a process of its own, so that the notebook can still choose its platform
        doctor = json.loads(run(sys.executable, "-m", "jaxseek.cli", "doctor", "--json").stdout)
        print(f"JAX computes on {doctor['facts'].get('devices')}; {doctor['facts']['packages']}")
        for problem in doctor["problems"]:
            print(f"problem: {problem['what']}\n         {problem['mend']}")
        if extra_for_runtime() and doctor["facts"].get("backend") in (None, "cpu"):
            raise RuntimeError("the accelerator of this runtime is not used: the problems above say why")


set_up()
