"""Several hosts as one: every worker of a slice runs the same command, and the processes join.

JAX knows a slice on Google Cloud (by the metadata server), GKE, multislice, SLURM, Open MPI and Kubernetes;
elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say where to meet.
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
TOKEN = ".jaxseek-host-"  # begins the name of a file that lives for as long as hosts look for it
PATIENCE = 35.0  # seconds to look for it: an NFS client may remember for 30 that a directory is not there
_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_INDICES = (_INDEX, "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "MEGASCALE_SLICE_ID")
_CHIP_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}  # of a host's chips, by their number


@dataclass(frozen=True)
class Cluster:
    """The number of hosts, and which of them this is."""

    count: int
    index: int


# -------------------------------------------------------------------- joining


def cluster() -> Cluster | None:
    """The cluster that this process belongs to; None on a single host. May ask the metadata server.

    Raises ConfigError where the variables that say so do not go together.
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

    Where some do not come, the process ends with a message and exit code 1 after JAXSEEK_HOSTS_TIMEOUT
    seconds (300): JAX, which waits in C++, would abort it with a stack trace. Raises ConfigError.
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
        jax.distributed.initialize(address, found.count, found.index, initialization_timeout=seconds + 60)
    finally:
        all_here.set()
    return found


def runs_here(verb: str, devices: bool) -> bool:
    """Return whether a command for one host runs on this one, host 0; say so where there are more.

    With `devices`, it keeps to this host's chips. Without, the environment alone tells which host this is.
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
    """Print nothing where `silent`: answers and progress come from one host."""
    if not silent:
        yield
        return
    out, err = contextlib.redirect_stdout, contextlib.redirect_stderr
    with open(os.devnull, "w") as nowhere, out(nowhere), err(nowhere):
        yield


def leave_failed(index: int, code: int) -> None:
    """End this process after its error: the regular end would wait for hosts that wait for this one.

    JAX ends the others: at once where host 0 left, and else when its heartbeats are missed, after 100 s. So
    host 0 stays for a moment, in which others can tell the same error.
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
    """Raise ConfigError where another process has the port of host 0: JAX may crash on it."""
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
    """Tell the user what is waited for, and end the process when it has not come in time."""
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
    time.sleep(0 if found.index else 3)  # so that others still find host 0
    os._exit(1)


def _connections(address: str) -> int:
    """Number of established connections to a port of this machine: one for each host, this one included."""
    port, count = int(address.rpartition(":")[2] or 0), 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table) as lines:
            rows = [line.split() for line in lines][1:]
            count += sum(int(r[1].rpartition(":")[2], 16) == port and r[3] == "01" for r in rows)
    return max(1, count)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 5).close()
    except (OSError, ValueError):
        return False
    return True


# -------------------------------------------------------------------- what only JAX's private modules know


def _detected() -> Cluster | None:
    """The cluster by JAX's own detection. JAX has no public way to ask without joining."""
    workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if _chips() and workers and "," not in workers and "MEGASCALE_COORDINATOR_ADDRESS" not in os.environ:
        return None  # of which JAX would first ask a metadata server that Colab and Kaggle have not
    import jax  # noqa: F401 - finds out whether this is a TPU VM
    from jax._src.clusters import ClusterEnv

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # JAX's own, of re.split
            # with an address, it does not wait for that of host 0 to be known
            found = ClusterEnv.auto_detect_unset_distributed_params("", None, None, None, None, 1)
        _, count, index, _ = found
    except Exception as e:  # of the network, Kubernetes, or variables that are not numbers
        print(
            f"jaxseek: JAX cannot tell whether there are other hosts ({type(e).__name__}: {str(e)[:200]}), "
            f"so this one runs alone; if there are, set {_ADDRESS}, {_COUNT} and {_INDEX}",
            file=sys.stderr,
        )
        return None
    return None if count is None or index is None else Cluster(count, index)


def _own_address() -> str:
    """Address and port of this host, host 0, as JAX detects it; empty where it cannot be resolved."""
    from jax._src.clusters import ClusterEnv

    with contextlib.suppress(RuntimeError):
        return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)[0] or ""
    return ""


def _meeting_place() -> str:
    """Address and port of host 0 while joining; empty as long as JAX has not found it."""
    from jax._src import distributed

    return distributed.global_state.coordinator_address or ""


# -------------------------------------------------------------------- one host of a slice


def _chips() -> int:
    """Number of TPU chips of this host, without loading libtpu."""
    return len(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _keep_to_own_chips() -> None:
    """Have libtpu take this host's chips for the whole slice; else it would wait for the other hosts."""
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


# -------------------------------------------------------------------- agreeing


def most(n: int) -> int:
    """The largest n of any host."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return n
    return int(np.max(multihost_utils.process_allgather(np.int32(n))))


def meet(where: str) -> None:
    """Wait until every host is here."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def from_first(make: Callable[[], T]) -> T:
    """Call `make` on host 0, and return what it returns, or raise what it raises, on every host."""
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
    """Pickle an answer; of an error that cannot be sent, the text."""
    try:
        blob = pickle.dumps(answer)
        pickle.loads(blob)
        return blob
    except Exception as e:
        error = answer[1] or e
        return pickle.dumps((None, ValueError(f"{type(error).__name__}: {error}")))


def gather(value: Any) -> list[Any]:
    """Return the value of every host, in their order; it has to be JSON."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    padded = np.frombuffer(text.ljust(most(len(text))), np.uint8)
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def check_shared(place: Any) -> None:
    """Raise ConfigError, on every host, unless all hosts see what host 0 writes into the directory `place`.

    `place` is a path, or what has `/`, `exists`, `write_text` and `unlink` as paths do.
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
