"""Guard the application: the size and time of a request's body, and keys."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Sequence
from typing import Any

OPEN = ("/health", "/ready", "/metrics", "/")  # need no key


def error_body(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: Any = None
) -> dict:
    """An error as the interface has it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Limits:
    """ASGI middleware: checks the key, and reads the whole body, within `seconds` and of at most `most`
    bytes.

    Without `keys` everybody may ask.
    """

    def __init__(self, app: Any, most: int, seconds: float, keys: Sequence[str], figures: Any):
        self.app, self.most, self.seconds, self.figures = app, most, seconds, figures
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if self.keys and scope["path"] not in OPEN and not self._knows(headers.get(b"authorization", b"")):
            return await self._refuse(
                send, 401, "a key is needed: Authorization: Bearer KEY", "invalid_api_key"
            )
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.most:
                        said = f"the request's body has more than {self.most:,} bytes"
                        return await self._refuse(send, 413, said, "request_too_large")
        except TimeoutError:
            said = f"the request's body did not come within {self.seconds:g} s"
            return await self._refuse(send, 408, said, "request_timeout")
        given = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> Any:
            return next(given, None) or await receive()

        return await self.app(scope, replay, send)

    def _knows(self, header: bytes) -> bool:
        scheme, _, given = header.partition(b" ")
        found = [
            hmac.compare_digest(given.strip(), key) for key in self.keys
        ]  # all, so that time tells nothing
        return scheme.lower() == b"bearer" and any(found)

    async def _refuse(self, send: Any, status: int, message: str, code: str) -> None:
        self.figures.refused.labels(str(status)).inc()
        body = json.dumps(error_body(message, code=code)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(b"www-authenticate", b"Bearer")] if status == 401 else [(b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
