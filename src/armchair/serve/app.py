"""The server: models, routes, rules and errors put together, and run."""

import asyncio
import contextlib
import importlib.util
import logging
import math
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from armchair import __version__
from armchair.errors import RequestError, WorkError
from armchair.serve.errors import ApiError, Json, error_answer
from armchair.serve.guard import LOOPBACK_NAMES, MIB, Guard, Rules, is_loopback
from armchair.serve.images import Store
from armchair.serve.keys import Keys
from armchair.serve.metrics import Metrics
from armchair.serve.openai_images import make_router
from armchair.serve.service import Busy, Service, Stopping, UnknownModel

log = logging.getLogger(__name__)

CONNECTIONS = 1000  # at a time; more are answered 503 before they are read


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a server is run. Raises RequestError where others could reach it and no keys are asked for."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys | None = None
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    body: int = 32 * MIB
    data: Path | None = None  # where the studio keeps its history; None: no studio
    ballot: Path | None = None
    grace: float = 30.0  # seconds in which what is being drawn may be finished when the server stops
    rules: Rules = field(init=False)

    def __post_init__(self) -> None:
        loopback = is_loopback(self.host)
        if not loopback and self.keys is None:
            raise RequestError(
                f"--host {self.host} can be reached from other machines: give --api-key-file FILE "
                "(armchair serve --api-key-file FILE --add-key NAME makes one), or leave --host out"
            )
        for origin in self.allow_origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise RequestError(f"--allow-origin {origin!r}: expected one such as https://example.org")
        hosts = None
        if loopback or self.allow_hosts:
            hosts = frozenset({*LOOPBACK_NAMES, self.host.lower(), *map(str.lower, self.allow_hosts)})
        rules = Rules(keys=self.keys, hosts=hosts, origins=frozenset(self.allow_origins), body=self.body)
        object.__setattr__(self, "rules", rules)


def data_folder() -> Path:
    """Where armchair keeps what a user made, as the system has it: below XDG_DATA_HOME, or ~/.local/share."""
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "armchair"


def make_app(service: Service, config: Config) -> Guard:
    """The ASGI application. Its lifespan opens the default model, and finishes what is being drawn at the end."""
    metrics, store = Metrics(), Store()
    opened: dict[str, str] = {}  # why the default model could not be

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def open_default() -> None:
            try:
                await service.run(None, lambda artist: artist.empty_prompt)
            except Exception as error:
                log.exception("the default model could not be opened")
                opened["error"] = f"{type(error).__name__}: {error}"

        opening = asyncio.create_task(open_default())
        yield
        opening.cancel()
        await service.close(config.grace)

    app = FastAPI(
        title="armchair",
        version=__version__,
        summary="Pictures from words, in the shape of OpenAI's Images API.",
        docs_url=None,  # their pages fetch scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.include_router(make_router(service, store, metrics))

    @app.get("/health", tags=["server"])
    async def health() -> dict[str, str]:
        """Whether the server runs at all."""
        return {"status": "ok"}

    @app.get("/ready", tags=["server"], responses={503: {"description": "the default model is not open yet"}})
    async def ready() -> Any:
        """Whether a request would be drawn at once: the default model is open."""
        if service.models.default in service.models.opened():
            return {"status": "ready"}
        return Json({"detail": opened.get("error", "the default model is being opened")}, status_code=503)

    @app.get("/metrics", tags=["server"], response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Counts and gauges, for Prometheus."""
        gauges = {}
        for name, drawer in service.models.opened().items():
            load = {key: float(value) for key, value in drawer.load().items()}
            gauges[name] = {f"queue_{key}": value for key, value in load.items()}
            gauges[name]["seconds_per_picture"] = drawer.seconds
        return PlainTextResponse(metrics.render(gauges), media_type="text/plain; version=0.0.4; charset=utf-8")

    _mount_studio(app, service, config)
    _answer_errors(app)
    inner: Any = app
    if config.allow_origins:
        inner = CORSMiddleware(
            app,
            allow_origins=list(config.allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return Guard(inner, config.rules, metrics)


def _mount_studio(app: FastAPI, service: Service, config: Config) -> None:
    """The page, where this installation has it, with the ballot that is asked for."""
    ballot = None
    if config.ballot is not None:
        from armchair.eval.ballot import Ballot  # here alone, as it needs the extra `evaluate`

        ballot = Ballot(config.ballot)
    if config.data is None or importlib.util.find_spec("armchair.serve.studio") is None:
        return
    history = importlib.import_module("armchair.serve.history").History(config.data / "history.sqlite")
    app.include_router(importlib.import_module("armchair.serve.studio").make_router(service, history, ballot))


def _answer_errors(app: FastAPI) -> None:
    """Whatever a request runs into becomes one clear answer."""

    def answer(kind: type[Exception], translate: Callable[[Any], HTTPException]) -> None:
        async def handle(request: Request, error: Exception) -> Response:
            return error_answer(request.url.path, translate(error))

        app.add_exception_handler(kind, handle)

    def wrong(error: Exception) -> HTTPException:
        message = str(error)
        field = message.partition(":")[0]
        return ApiError(400, message, param=field if field.isidentifier() else None)

    def not_valid(error: RequestValidationError) -> HTTPException:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        name = ".".join(place)[:100] or None
        if first["type"] == "extra_forbidden":
            return ApiError(400, f"unknown field {name!r}", param=name, code="unknown_parameter")
        got = first.get("input")
        shown = f", got {got!r:.60}" if isinstance(got, (str, int, float, bool)) else ""
        return ApiError(400, f"{name or 'body'}: {first['msg']}{shown}", param=name, code="invalid_value")

    def busy(error: Busy) -> HTTPException:
        seconds = str(min(600, math.ceil(error.retry_after)))
        return ApiError(429, str(error), code="rate_limit_exceeded", headers={"retry-after": seconds})

    answer(RequestError, wrong)
    answer(RequestValidationError, not_valid)
    answer(Busy, busy)
    answer(UnknownModel, lambda error: ApiError(404, str(error), param="model", code="model_not_found"))
    answer(Stopping, lambda error: ApiError(503, str(error), code="server_stopping"))
    answer(HTTPException, lambda error: error)
    answer(WorkError, lambda error: ApiError(500, str(error), code="work_error"))
    answer(Exception, lambda error: ApiError(500, "something failed here; the log says what", code="server_error"))


class Server(uvicorn.Server):
    """A server that, once it is told to stop, takes nothing more in, and says so to what it cannot finish."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float):
        super().__init__(config)
        self.service, self.grace = service, grace
        self.on_start: Callable[[], None] = lambda: None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_start()

    async def shutdown(self, sockets: Any = None) -> None:
        closing = asyncio.create_task(self.service.close(self.grace))
        await super().shutdown(sockets)
        if self.force_exit:  # a second Ctrl-C
            self.service.stop()
            await self.lifespan.shutdown()
        await closing


def make_server(service: Service, config: Config) -> Server:
    """A server that is not started yet: `run()` blocks, `await serve()` does in a loop that runs."""
    settings = uvicorn.Config(
        make_app(service, config),
        host=config.host,
        port=config.port,
        log_level="error",  # it warns of each request that is no HTTP
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=math.ceil(config.grace) + 5,
        ws="none",
    )
    return Server(settings, service, config.grace)


def run(service: Service, config: Config, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; `say` is told where."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each damaged form
    names = ", ".join(service.models.names())
    server = make_server(service, config)
    where = f"http://{host}:{config.port}/"
    server.on_start = lambda: say(f"armchair serves {names} at {where} (API: {where}v1; Ctrl-C ends it)")
    with listening(config.host, config.port) as link, contextlib.suppress(KeyboardInterrupt):
        server.run([link])  # raises what stopped it again once all is finished


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises RequestError where that cannot be."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=1024)
    except OSError as error:
        raise RequestError(f"cannot listen on {host}, port {port}: {error.strerror}; see --host and --port") from None
