"""Object stores on this machine, for tests: an S3 (moto) and a GCS (gcp-storage-emulator), each a process.

python tests/helpers/buckets.py s3 5555        serves until it is ended
"""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

BUCKET = "bucket"


def serve_s3(port: int) -> None:
    from moto.server import main

    main(["-H", "127.0.0.1", "-p", str(port)])


def serve_gcs(port: int) -> None:
    """The emulator, with what it lacks and tensorstore asks for: generations, and conditions on them."""
    from http import HTTPStatus

    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound

    def generation(request, storage):
        name = request.params.get("object_id") or request.query.get("name", [None])[0]
        if name is None:
            return None
        try:
            return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except NotFound:
            return "0"

    def conditional(handler):
        def handle(request, response, storage, *args, **kwargs):
            params = request.params or {}
            now = generation(request, storage) if "bucket_name" in params else None
            wanted = request.query.get("ifGenerationMatch", [now])[0]
            unwanted = request.query.get("ifGenerationNotMatch", [None])[0]
            if now is not None and wanted != now:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return None
            if now is not None and unwanted == now:
                response.status = HTTPStatus.NOT_MODIFIED
                return None
            if now not in (None, "0"):
                response["x-goog-generation"] = now
            return handler(request, response, storage, *args, **kwargs)

        return handle

    for _, methods in server.HANDLERS:
        if "PUT" in methods:
            methods.setdefault("POST", methods["PUT"])  # parts of an upload come by either
        methods.update({method: conditional(handler) for method, handler in methods.items()})
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).run()


@contextlib.contextmanager
def running(kind: str):
    """A server in a process of its own; gives a URL and the environment that reaches it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    log = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, __file__, kind, str(port)], stdout=log, stderr=log)
    try:
        _wait_for(address, process)
        if kind == "s3":
            urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"))
            yield (
                f"s3://{BUCKET}",
                {
                    "AWS_ACCESS_KEY_ID": "test",
                    "AWS_SECRET_ACCESS_KEY": "test",
                    "AWS_DEFAULT_REGION": "us-east-1",
                    "AWS_ENDPOINT_URL": address,
                },
            )
        else:
            yield (
                f"gs://{BUCKET}",
                {
                    "STORAGE_EMULATOR_HOST": address,
                    "TENSORSTORE_GCS_HTTP_URL": address,
                    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",
                    "NO_GCE_CHECK": "true",  # nobody asks Google's metadata server who we are
                    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # needs gRPC, which the emulator has not
                },
            )
    finally:
        process.kill()
        process.wait()


def _wait_for(address: str, process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=1)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"no server at {address}")


if __name__ == "__main__":
    {"s3": serve_s3, "gcs": serve_gcs}[sys.argv[1]](int(sys.argv[2]))
