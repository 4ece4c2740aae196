"""Join several hosts: every worker of a slice runs the same command, and the processes find each other.

JAX detects the cluster on Google Cloud (by the metadata server), GKE, multislice, SLURM, Open MPI and
Kubernetes; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import pickle
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxseek.config.model import ConfigError

T = TypeVar("T")
TIMEOUT = "JAXSEEK_HOSTS_TIMEOUT"  # seconds to wait for all hosts
TOKEN = ".jaxseek-host-"  # prefix of the file that hosts look for in check_shared
PATIENCE = 35.0  # seconds to look for it: an NFS client may cache for 30 s that a directory does not exist
_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_INDICES = (_INDEX, "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "MEGASCALE_SLICE_ID")
_CHIP_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}  # libtpu's bounds by chips of a host


@dataclass(frozen=True)
class Cluster:
    """The number of hosts, and the index of this one."""

    count: int
    index: int


# -------------------------------------------------------------------- joining


def cluster() -> Cluster | None:
    """Return the cluster that this process belongs to, or None on a single host.

    May ask the metadata server. Raises ConfigError if the environment variables contradict each other.
    """
    given = {name: value for name in (_ADDRESS, _COUNT, _INDEX) if (value := os.environ.get(name))}
    if given.get(_COUNT) == "1":
        return None
    if len(given) < 3 and (detected := _detected()):
        given = {_ADDRESS: "", _COUNT: str(detected.count), _INDEX: str(detected.index)} | given
    if not given:
        return None
    if missing := [name for name in (_ADDRESS, _COUNT, _INDEX) if name not in given]:
        raise ConfigError(
            f"{' and '.join(given)} without {' and '.join(missing)}, where JAX detects no cluster; set all "
            f"of {_ADDRESS} (host 0 and a port), {_COUNT} and {_INDEX}, or none"
        )
    host, _, port = given[_ADDRESS].rpartition(":")
    if given[_ADDRESS] and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"{_ADDRESS} is {given[_ADDRESS]!r}, expected HOST:PORT, such as 10.0.0.2:8476")
    try:
        found = Cluster(int(given[_COUNT]), int(given[_INDEX]))
    except ValueError:
        found = Cluster(0, 0)
    if not 0 <= found.index < found.count:
        raise ConfigError(
            f"{_COUNT} is {given[_COUNT]!r} and {_INDEX} is {given[_INDEX]!r}, expected a number of "
            "processes and a number below it"
        )
    return found if found.count > 1 else None


def join() -> Cluster | None:
    """Join the other hosts, before anything touches a device. Does nothing on a single host.

    If some are missing after JAXSEEK_HOSTS_TIMEOUT seconds (300), the process ends with a message and exit
    code 1; JAX itself waits in C++ and would abort with a stack trace. Raises ConfigError.
    """
    import jax

    if jax.distributed.is_initialized():
        return Cluster(jax.process_count(), jax.process_index())
    found = cluster()
    if found is None:
        if os.environ.get(_COUNT) == "1":
            _keep_to_own_chips()
        return None
    if found.index == 0:
        _check_port(os.environ.get(_ADDRESS) or _own_address())
    seconds, all_here = _seconds(), threading.Event()
    threading.Thread(target=_watch, args=(found, seconds, all_here), daemon=True).start()
    try:
        address = os.environ.get(_ADDRESS)
        timeout = seconds + 60
        with _without_jax_deprecations():
            jax.distributed.initialize(address, found.count, found.index, initialization_timeout=timeout)
    finally:
        all_here.set()
    return found


def runs_here(verb: str, devices: bool) -> bool:
    """Return whether a single-host command runs on this host (host 0), with a note if there are more.

    With `devices`, the command keeps to this host's chips. Without, only environment variables are read to
    find out which host this is.
    """
    if devices:
        found = cluster()
        if found is None or found.index == 0:
            if found is not None:
                print(f"jaxseek {verb}: runs on host 0 of {found.count} alone", file=sys.stderr)
            if found is not None or os.environ.get(_COUNT) == "1":
                _keep_to_own_chips()
            return True
    elif os.environ.get(_COUNT) == "1" or not any(os.environ.get(i, "0").strip("0") for i in _INDICES):
        return True
    print(f"jaxseek {verb}: runs on host 0, not on this one ({_COUNT}=1 runs it here)", file=sys.stderr)
    return False


@contextlib.contextmanager
def quiet(silent: bool) -> Iterator[None]:
    """Suppress all output if `silent`, so that answers and progress come from one host."""
    if not silent:
        yield
        return
    out, err = contextlib.redirect_stdout, contextlib.redirect_stderr
    with open(os.devnull, "w") as nowhere, out(nowhere), err(nowhere):
        yield


def leave_failed(index: int, code: int) -> None:
    """Exit after an error without JAX's regular shutdown, which would wait for hosts that wait for this one.

    JAX ends the others: at once if host 0 has left, otherwise after 100 s of missed heartbeats. Host 0
    therefore stays for a moment, in which the others can report the same error.
    """
    time.sleep(0 if index else 2)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _seconds() -> int:
    text = os.environ.get(TIMEOUT, "300")
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"{TIMEOUT} is {text!r}, expected a number of seconds, such as 300")
    return int(text)


def _check_port(address: str) -> None:
    """Raise ConfigError if another process has host 0's port; JAX may crash on it."""
    port = address.rpartition(":")[2]
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind(("", int(port or 0)))
        except OSError as e:
            raise ConfigError(
                f"hosts cannot meet at {address}: port {port} of host 0 is taken ({e}); end the process that "
                f"has it, or set another on every worker (in {_ADDRESS}, or as JAX_COORDINATOR_PORT)"
            ) from None


def _watch(found: Cluster, seconds: int, all_here: threading.Event) -> None:
    """Tell the user which hosts are awaited, and end the process if they do not come in time."""
    name, soon = f"jaxseek: host {found.index} of {found.count}", min(10, seconds)
    if all_here.wait(soon):
        return
    print(f"{name}: waiting for the others, up to {seconds} s", file=sys.stderr, flush=True)
    if all_here.wait(seconds - soon):
        return
    address = _meeting_place()
    if found.index == 0:
        came = f"{_connections(address)} of {found.count} hosts came"
    elif _answers(address):
        came = "host 0 is there, but others are not"
    else:
        came = f"host 0 does not answer at {address or 'the address that JAX found'}"
    print(
        f"{name}: error: {came} within {seconds} s ({TIMEOUT}). Start the same command on every worker, as "
        "by gcloud compute tpus tpu-vm ssh NAME --worker=all --command=..., and let them reach the port; "
        f"{_COUNT}=1 runs it on this host alone",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(0 if found.index else 3)  # the others can still find host 0
    os._exit(1)


def _connections(address: str) -> int:
    """Count established connections to a port of this machine: one per host, this one included."""
    port, count = int(address.rpartition(":")[2] or 0), 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table) as lines:
            rows = [line.split() for line in lines][1:]
            count += sum(int(r[1].rpartition(":")[2], 16) == port and r[3] == "01" for r in rows)
    return max(1, count)


def _answers(address: str) -> bool:
    """Return True if something accepts connections at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 5).close()
    except (OSError, ValueError):
        return False
    return True


# -------------------------------------------------------------------- JAX's private modules


@contextlib.contextmanager
def _without_jax_deprecations() -> Iterator[None]:
    """Ignore deprecations in JAX's own cluster detection: re.split with positional maxsplit, Python 3.13."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _detected() -> Cluster | None:
    """Return the cluster that JAX detects. JAX has no public way to ask without joining."""
    workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if _chips() and workers and "," not in workers and "MEGASCALE_COORDINATOR_ADDRESS" not in os.environ:
        return None  # one host; JAX would ask a metadata server first, which Colab and Kaggle lack
    import jax  # noqa: F401 - finds out whether this is a TPU VM
    from jax._src.clusters import ClusterEnv

    try:
        with _without_jax_deprecations():
            # given an address, JAX does not wait until it knows host 0's
            found = ClusterEnv.auto_detect_unset_distributed_params("", None, None, None, None, 1)
        _, count, index, _ = found
    except Exception as e:  # network or Kubernetes errors, or variables that are not numbers
        print(
            f"jaxseek: JAX cannot tell whether there are other hosts ({type(e).__name__}: {str(e)[:200]}), "
            f"so this one runs alone; if there are, set {_ADDRESS}, {_COUNT} and {_INDEX}",
            file=sys.stderr,
        )
        return None
    return None if count is None or index is None else Cluster(count, index)


def _own_address() -> str:
    """Return this host's address and port as JAX detects it on host 0; "" if it cannot be resolved."""
    from jax._src.clusters import ClusterEnv

    with contextlib.suppress(RuntimeError):
        return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)[0] or ""
    return ""


def _meeting_place() -> str:
    """Return host 0's address and port while joining; "" until JAX has found it."""
    from jax._src import distributed

    return distributed.global_state.coordinator_address or ""


# -------------------------------------------------------------------- one host of a slice


def _chips() -> int:
    """Count this host's TPU chips without loading libtpu."""
    return len(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _keep_to_own_chips() -> None:
    """Make libtpu treat this host's chips as the whole slice; it would wait for the other hosts otherwise."""
    chips = _chips()
    if chips not in _CHIP_BOUNDS or "TPU_PROCESS_BOUNDS" in os.environ:
        return
    for name in [name for name in os.environ if name.startswith("MEGASCALE_")]:
        del os.environ[name]
    os.environ |= {
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": _CHIP_BOUNDS[chips],
        "TPU_VISIBLE_CHIPS": ",".join(map(str, range(chips))),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }


# -------------------------------------------------------------------- agreement


def most(n: int) -> int:
    """Return the maximum of `n` over all hosts."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return n
    return int(np.max(multihost_utils.process_allgather(np.int32(n))))


def meet(where: str) -> None:
    """Wait until every host has reached this barrier."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def from_first(make: Callable[[], T]) -> T:
    """Call `make` on host 0; return its result, or raise its exception, on every host."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return make()
    answer: tuple[Any, Exception | None] = None, None
    if jax.process_index() == 0:
        try:
            answer = make(), None
        except Exception as e:
            answer = None, e
    blob = _pickled(answer)
    size = most(len(blob))
    sent = multihost_utils.broadcast_one_to_all(np.frombuffer(blob.ljust(size, b"\0"), np.uint8))
    value, error = pickle.loads(np.asarray(sent).tobytes())
    if error is not None:
        raise error
    return value


def _pickled(answer: tuple[Any, Exception | None]) -> bytes:
    """Pickle an answer; an exception that cannot be pickled becomes a ValueError with its text."""
    try:
        blob = pickle.dumps(answer)
        pickle.loads(blob)
        return blob
    except Exception as e:
        error = answer[1] or e
        return pickle.dumps((None, ValueError(f"{type(error).__name__}: {error}")))


def gather(value: Any) -> list[Any]:
    """Return the JSON value of every host, in host order."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    padded = np.frombuffer(text.ljust(most(len(text))), np.uint8)
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def check_shared(place: Any) -> None:
    """Raise ConfigError, on every host, unless all hosts see a file that host 0 writes into `place`.

    `place` is a directory: a path, or an object with the `/`, `exists`, `write_text` and `unlink` of one.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return

    def write() -> str:
        name = TOKEN + uuid.uuid4().hex
        (place / name).write_text("")
        return name

    token, end = place / from_first(write), time.monotonic() + PATIENCE
    while not (seen := token.exists()) and time.monotonic() < end:
        time.sleep(0.2)
    blind = np.flatnonzero(multihost_utils.process_allgather(np.int32(not seen)))
    if jax.process_index() == 0:
        token.unlink()
    if len(blind):
        names = ", ".join(map(str, blind[:8])) + (", ..." if len(blind) > 8 else "")
        raise ConfigError(
            f"{place} is on host 0's own disk: host {names} does not see it. With several hosts give a place "
            "that all of them share, such as gs://BUCKET/... or a directory that all mount"
        )
