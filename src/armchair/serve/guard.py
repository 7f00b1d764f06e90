"""What every request has to pass before it is looked at: host, origin, key, size. Plain ASGI, around the whole app."""

import asyncio
import ipaddress
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from armchair.serve.errors import ApiError, error_answer
from armchair.serve.keys import Keys
from armchair.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MIB = 2**20
SAFE = ("GET", "HEAD", "OPTIONS")
OPEN = ("/", "/health", "/ready", "/favicon.ico")  # without a key, and what begins so:
OPEN_BELOW = ("/studio/static/", "/v1/images/files/", "/ballot/")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Who is let in. Sizes in bytes.

    `hosts`: the names that a request may be addressed to, None for any; `origins`: pages of other sites that may ask.
    """

    keys: Keys | None = None
    hosts: frozenset[str] | None = None
    origins: frozenset[str] = frozenset()
    body: int = 32 * MIB
    json_body: int = MIB
    body_seconds: float = 60.0


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """The app behind the rules; it gives each answer an `x-request-id` and counts it."""

    def __init__(self, app: App, rules: Rules, metrics: Metrics):
        self.app, self.rules, self.metrics = app, rules, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # nothing here speaks over web sockets
            await receive()
            return await send({"type": "websocket.close", "code": 1008})
        began, status, id = time.perf_counter(), 499, f"req_{secrets.token_hex(12)}"

        async def tell(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"cross-origin-resource-policy", b"same-origin"),
                    (b"referrer-policy", b"same-origin"),
                    (b"x-frame-options", b"DENY"),
                ]
            await send(message)

        scope.setdefault("state", {})["request_id"] = id
        try:
            headers = _headers(scope)
            self._check_host(headers)
            self._check_origin(scope, headers)
            self._check_key(scope, headers)
            limit = self._check_size(scope, headers)
        except ApiError as error:
            await error_answer(scope["path"], error)(scope, receive, tell)
        else:
            await self.app(scope, _Body(receive, limit, self.rules.body_seconds), tell)
        finally:
            route = getattr(scope.get("route"), "path", None) or "other"
            method = scope["method"] if scope["method"] in (*SAFE, "POST", "PUT", "PATCH", "DELETE") else "other"
            self.metrics.request(method, route, status, time.perf_counter() - began)

    def _check_host(self, headers: dict[str, str]) -> None:
        """A name that is not ours in `host` is a page whose name was rebound to this machine's address."""
        hosts = self.rules.hosts
        if hosts is not None and _host_of("//" + headers.get("host", "")) not in hosts:
            raise ApiError(403, "this host name is not served here; see --allow-host", code="wrong_host")

    def _check_origin(self, scope: Scope, headers: dict[str, str]) -> None:
        """A page of another site may not make a browser ask here, whatever it could read of the answer."""
        origin = headers.get("origin")
        if origin in self.rules.origins:
            return
        own = origin is not None and _place_of(origin) == headers.get("host", "").lower()
        foreign = not own if origin is not None else headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if foreign and (scope["method"] not in SAFE or origin is not None):
            raise ApiError(
                403, "pages of other sites may not ask here; --allow-origin ORIGIN would let one", code="wrong_origin"
            )

    def _check_key(self, scope: Scope, headers: dict[str, str]) -> None:
        keys, path = self.rules.keys, scope["path"]
        if keys is None or path in OPEN or path.startswith(OPEN_BELOW) or _is_preflight(scope, headers):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        owner = keys.owner(key.strip()) if scheme.lower() == "bearer" and key.strip() else None
        if owner is None:
            said = "this API key is not known here" if key else "an API key is needed"
            raise ApiError(
                401,
                f"{said}: send it as 'authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _check_size(self, scope: Scope, headers: dict[str, str]) -> int:
        """The most bytes that the body may have."""
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise ApiError(415, "bodies are read as they are: leave content-encoding out", code="unsupported_encoding")
        multipart = headers.get("content-type", "").strip().lower().startswith("multipart/form-data")
        pictures = multipart or scope["path"].startswith("/studio/")
        limit = self.rules.body if pictures else self.rules.json_body
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise ApiError(400, "content-length: expected a whole number")
        if len(length) > 18 or int(length) > limit:
            raise _too_large(limit)
        return limit


class _Body:
    """`receive` with a bound on what comes in, and on how long it takes."""

    def __init__(self, receive: Receive, limit: int, seconds: float):
        self.receive, self.limit = receive, limit
        self.ends, self.size, self.whole = time.monotonic() + seconds, 0, False

    async def __call__(self) -> MutableMapping[str, Any]:
        if self.whole:
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), max(0.0, self.ends - time.monotonic()))
        except TimeoutError:
            raise ApiError(408, "the body took too long to come", headers={"connection": "close"}) from None
        self.size += len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        if self.size > self.limit:
            raise _too_large(self.limit)
        return message


def _too_large(limit: int) -> ApiError:
    said = f"{limit / MIB:g} MiB" if limit >= MIB else f"{limit} bytes"
    message = f"the body is too large: expected at most {said}"
    return ApiError(413, message, code="too_large", headers={"connection": "close"})


def _headers(scope: Scope) -> dict[str, str]:
    """By their lower-case names; a host that comes twice is refused, of others the last counts."""
    pairs: Sequence[tuple[bytes, bytes]] = scope["headers"]
    if sum(name == b"host" for name, _ in pairs) > 1:
        raise ApiError(400, "expected one host header")
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in pairs}


def _host_of(url: str) -> str | None:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return None


def _place_of(origin: str) -> str | None:
    """HOST:PORT of an origin, as the host header has it; None for what is none, such as `null`."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") and parts.netloc else None


def _is_preflight(scope: Scope, headers: dict[str, str]) -> bool:
    return scope["method"] == "OPTIONS" and "access-control-request-method" in headers
