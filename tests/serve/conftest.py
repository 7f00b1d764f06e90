import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from armchair.serve.app import Config, Server, make_server
from armchair.serve.models import Models
from armchair.serve.service import Service
from conftest import write_tiny_bundle


@contextlib.contextmanager
def serving(service: Service, **config: Any) -> Iterator[tuple[Server, str]]:
    """A server in a thread, and its address."""
    server = make_server(service, Config(**{"port": 0, "grace": 5.0, **config}))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def ranked_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 x 16 pixels, 4 x 4 codes, random weights, with a ranker that captions."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "ranked", ranked=True, captioned=True)


@pytest.fixture(scope="session")
def address(ranked_bundle: Path, tiny_bundle: Path) -> Iterator[str]:
    """A server of two models, of which `dall-e-3` is another name for one."""
    models = Models([f"first={ranked_bundle}", f"second={tiny_bundle}"], aliases={"dall-e-3": "first"}, device="cpu")
    with serving(Service(models, candidates=64)) as (_, address):
        yield address


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


Serve = Callable[..., contextlib.AbstractContextManager[tuple[Server, str]]]


@pytest.fixture
def serve() -> Serve:
    return serving
