"""Find versions that do not go together, hardware that JAX does not use and why, and faults of memory, disk,
compile cache and buckets; each problem with the command that mends it. Exit code 1 where there is one.

example:
  jaxseek doctor gs://my-bucket/checkpoints
"""

# It says something useful where importing JAX or Flax fails or hangs, so it imports neither:
# `jaxseek.cli.probe` does, in a process with a time limit.

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxseek.cli.shared import number
from jaxseek.machine import accelerators
from jaxseek.machine.host_memory import free_memory, total_memory

SHOWN = (
    "jaxseek",
    "jax",
    "jaxlib",
    "libtpu",
    *accelerators.CUDA_PLUGINS,
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
)
CHECKED = ("jaxseek", "jax", "flax", "optax", "orbax-checkpoint", "grain")  # whose requirements must be met
LOCK = Path("/tmp/libtpu_lockfile")
_LITTLE_DISK = 2 << 30  # bytes; a tiny run's checkpoints and compiled programs


@dataclass
class Report:
    """Facts by name, and findings: problems fail the examination, notes do not."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[dict[str, str]] = field(default_factory=list)
    notes: list[dict[str, str]] = field(default_factory=list)

    def problem(self, what: str, mend: str = "") -> None:
        self.problems.append({"what": what, "mend": mend})

    def note(self, what: str, mend: str = "") -> None:
        self.notes.append({"what": what, "mend": mend})


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "buckets", nargs="*", metavar="URL", help="gs://, s3:// or another directory to reach"
    )
    parser.add_argument(
        "--timeout",
        type=number(0, 86400, above=True),
        default=60,
        metavar="S",
        help="to wait for JAX, for a bucket",
    )
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    from jaxseek.machine.terminal import table, visible

    report = examine(args.buckets, args.timeout)
    if args.json:
        print(json.dumps({"ok": not report.problems, **vars(report)}))
        return 1 if report.problems else 0
    table("jaxseek doctor", {name: _shown(value) for name, value in report.facts.items()})
    for kind, findings in (("note", report.notes), ("problem", report.problems)):
        for finding in findings:
            mend = f"\n         {finding['mend']}" if finding["mend"] else ""
            print(visible(f"{kind + ':':8} {finding['what']}{mend}"))
    if not report.problems:
        print("no problems found")
    return 1 if report.problems else 0


def examine(buckets: list[str], timeout: float) -> Report:
    """Everything in turn. Nothing that is broken here stops it."""
    report = Report()
    report.facts["python"] = f"{platform.python_version()}, {sys.executable}"
    report.facts["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    _packages(report)
    found = accelerators.find_accelerators()
    report.facts["accelerators"] = [str(a) for a in found]
    _libtpu(report, found)
    _devices(report, found, timeout)
    _hosts(report, found)
    _memory_and_disk(report)
    report.facts["buckets"] = [_bucket(report, url, timeout) for url in buckets]
    return report


def _packages(report: Report) -> None:
    """Versions, and requirements of the core packages that what is installed does not meet."""
    versions = {name: version for name in SHOWN if (version := accelerators.installed(name))}
    report.facts["packages"] = versions
    if "jaxseek" not in versions:
        report.note("jaxseek runs from a folder and is not installed, so its requirements are not checked")
    for package in ("jax", "flax"):
        if package not in versions:
            report.problem(f"{package} is not installed", f"pip install {package}")
    unmet = _unmet_requirements([name for name in CHECKED if name in versions])
    mend = "pip install -U " + " ".join(shlex.quote(requirement) for _, requirement, _ in unmet)
    for package, requirement, have in unmet:
        report.problem(f"{package} needs {requirement}, and {have or 'none'} is installed", mend)


def _unmet_requirements(packages: list[str]) -> list[tuple[str, str, str]]:
    """Package, what it needs and the version that is here, or ""; as `pip check`, for these packages."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [("jaxseek", "packaging", "")]
    found = {}
    for package in packages:
        for line in importlib.metadata.requires(package) or []:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            have = accelerators.installed(requirement.name) or ""
            if not have or not requirement.specifier.contains(have, prereleases=True):
                short = f"{requirement.name}{requirement.specifier}"
                found[short] = (package, short, have)
    return list(found.values())


def _libtpu(report: Report, found: list[accelerators.Accelerator]) -> None:
    """A libtpu of another release than jax expects, and one that is known to be wrong."""
    libtpu, jax, expected = (
        accelerators.installed("libtpu"),
        accelerators.installed("jax"),
        accelerators.expected_libtpu(),
    )
    if not (libtpu and jax):
        return
    tell = report.problem if any(a.kind == "tpu" for a in found) else report.note
    if expected and accelerators.numbers(libtpu)[:3] != accelerators.numbers(expected)[:3]:
        newer = "newer" if accelerators.numbers(libtpu) > accelerators.numbers(expected) else "older"
        text = f"libtpu {libtpu} is {newer} than jax {jax} was released with ({expected})"
        (report.note if newer == "newer" else tell)(text, f"pip install 'jax[tpu]=={jax}'")
    if bad := accelerators.BAD_LIBTPU.get(accelerators.numbers(libtpu)[:3]):
        release = accelerators.good_release_for_tpu(jax)
        mend = f"pip install -U 'jax[tpu]=={release}'" if release != jax else "pip install -U 'jax[tpu]'"
        tell(f"libtpu {libtpu}: {bad}", mend)


def _devices(report: Report, found: list[accelerators.Accelerator], timeout: float) -> None:
    """Ask JAX, in a process of its own, what it computes on; and tell why it is not the accelerator."""
    told, ended = _run_probe(["jax"], timeout)
    broken = False
    for line in told:
        if "imported" in line and "error" in line:
            broken = True
            report.problem(f"import {line['imported']} fails: {line['error']}", _mend_import(report))
    last = told[-1] if told and "backend" in told[-1] else None
    asked = os.environ.get("JAX_PLATFORMS")
    report.facts["JAX_PLATFORMS"] = asked or "not set"
    report.facts["backend"] = last and last["backend"]
    if last and last["backend"]:
        each = f", {last['memory'] / 2**30:.1f} GiB each" if last["memory"] else ""
        report.facts["devices"] = f"{last['devices']} x {last['kind']}{each}"
    if broken and last and last["backend"] is None:
        return  # its error follows from those
    held = _held(report, found)
    if not ended and last is None:
        why = held or (
            "does another process hold it, or do the other hosts of the slice not run the same command?"
            if found
            else "the last that it passed was " + (told[-1].get("imported", "") if told else "nothing")
        )
        report.problem(f"JAX found no devices within {timeout:g} s: {why}", "jaxseek doctor --timeout 300")
    elif last is None:
        report.problem(f"the process that asked JAX for its devices ended without an answer: {ended}")
    elif last["backend"] is None:
        report.problem(
            f"JAX cannot start: {last['error']}" + (f" ({held})" if held else ""), _mend_backend(found)
        )
    elif unused := accelerators.unused_accelerator(found, last["backend"]):
        report.problem(unused[0] + (f" ({held})" if held else ""), unused[1])


def _mend_import(report: Report) -> str:
    """The command of an unmet requirement, which is the likely cause; else a fresh installation."""
    mends = [p["mend"] for p in report.problems if p["mend"].startswith("pip install")]
    return mends[0] if mends else "pip install --force-reinstall of the package that it names, or a new venv"


def _mend_backend(found: list[accelerators.Accelerator]) -> str:
    for accelerator in found:
        if problem := accelerators.driver_problem(accelerator):
            return problem[1]
    return "JAX_PLATFORMS=cpu computes on the CPU meanwhile"


def _held(report: Report, found: list[accelerators.Accelerator]) -> str:
    """Which processes hold the TPU, or that only the lock file of one that has ended is left."""
    chips = next((a for a in found if a.kind == "tpu"), None)
    if chips is None:
        return ""
    if processes := accelerators.holders(chips):
        names = ", ".join(f"{pid} ({command[:60]})" for pid, command in processes.items())
        report.facts["TPU held by"] = names
        return f"the TPU is held by process {names}; one process at a time can have it"
    if LOCK.exists():
        report.note(
            f"{LOCK} is there and no process of yours holds the TPU: another user's does, or one was killed",
            f"sudo lsof -w {chips.devices[0] if chips.devices else '/dev/accel0'} || sudo rm {LOCK}",
        )
        return f"{LOCK} is there"
    return ""


def _hosts(report: Report, found: list[accelerators.Accelerator]) -> None:
    """How many processes a run would have, by what launchers set; nothing is joined."""
    given = {
        name: os.environ[name]
        for name in (
            *("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"),
            *(
                "JAX_COORDINATOR_ADDRESS",
                "JAX_NUM_PROCESSES",
                "JAX_PROCESS_ID",
                "SLURM_NTASKS",
                "SLURM_PROCID",
            ),
        )
        if os.environ.get(name)
    }
    on_tpu = any(a.kind == "tpu" for a in found)
    if on_tpu and not given and (endpoints := _metadata("worker-network-endpoints")):
        given = {"in this slice": str(endpoints.count(",") + 1), "this is": _metadata("agent-worker-number")}
    report.facts["hosts"] = given or "one"


def _metadata(attribute: str) -> str:
    """An attribute of a Google Cloud virtual machine; "" elsewhere."""
    import urllib.request

    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{attribute}"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _memory_and_disk(report: Report) -> None:
    gib = 2**30
    report.facts["memory"] = f"{free_memory() / gib:.1f} GiB free of {total_memory() / gib:.1f}"
    cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))
    for name, folder in (("this directory", Path.cwd()), ("compile cache", cache)):
        if "://" in str(folder):
            report.facts[name] = str(folder)
            continue
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        report.facts[name] = f"{folder}, {free / gib:.1f} GiB free"
        if free < _LITTLE_DISK:
            report.note(f"{folder}: only {free / gib:.1f} GiB are free, and checkpoints need more")
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as e:
            (report.problem if name == "compile cache" else report.note)(
                f"{name} {folder} cannot be written: {e.strerror}",
                "export JAX_COMPILATION_CACHE_DIR=a/folder/that/can" if name == "compile cache" else "",
            )


_CREDENTIALS = {
    "gs": "gcloud auth application-default login; gcloud storage buckets create where there is none",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL for another server",
}


def _bucket(report: Report, url: str, timeout: float) -> str:
    told, ended = _run_probe(["bucket", url], timeout)
    found = told[-1] if told else {"error": ended or f"no answer within {timeout:g} s"}
    if "error" in found:
        mend = found.get("mend") or _CREDENTIALS.get(url.partition("://")[0].lower(), "")
        report.problem(f"{url} cannot be used: {found['error']}", mend)
        return f"{url}: not usable"
    entries = "new" if found["entries"] is None else f"{found['entries']} entries"
    return f"{url}: {entries}, {'writable' if found['writable'] else 'read-only'}"


def _run_probe(arguments: list[str], timeout: float) -> tuple[list[dict[str, Any]], str]:
    """The lines of a probe, and how it ended; "" where it had to be stopped."""
    command = [sys.executable, "-m", "jaxseek.cli.probe", *arguments]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        ended = ""
        try:
            code = process.wait(timeout)
            err.seek(0)
            last = err.read().strip().splitlines()[-1:]
            ended = f"exit code {code}" + (f", {last[0]}" if last and code else "")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        out.seek(0)
        return [json.loads(line) for line in out if line.startswith("{")], ended


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list):
        return "\n".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
