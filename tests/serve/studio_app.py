"""A studio on a port of this machine, for tests, and a service whose moods can be set."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from armchair.eval.ballot import Ballot
from armchair.serve.app import Config, make_server
from armchair.serve.keys import Keys
from armchair.serve.models import Models
from armchair.serve.service import Busy, DrawRequest, Event, Queued, Service


class MoodyService(Service):
    """Draws as ever, once it has said what it was told to say."""

    busy: float | None = None  # seconds to wait: requests find no room
    queue: tuple[int, ...] = ()  # places that a request is told before its turn
    slow = 0.0  # seconds before each event
    given_up = 0  # requests that ended before they were drawn

    async def draw(self, request: DrawRequest, *, partials: bool = False) -> AsyncIterator[Event]:
        if self.busy is not None:
            raise Busy("16 requests are waiting already", self.busy)
        finished = False
        try:
            for position in self.queue:
                yield Queued(position)
                await asyncio.sleep(self.slow)
            async with contextlib.aclosing(super().draw(request, partials=partials)) as events:
                async for event in events:
                    yield event
                    await asyncio.sleep(self.slow)
            finished = True
        finally:
            self.given_up += not finished


@contextlib.contextmanager
def studio(
    bundle: Path | None, data: Path, ballot: Ballot | None = None, keys: Keys | None = None
) -> Iterator[tuple[str, MoodyService]]:
    """The address of a running server, and its service."""
    service = MoodyService(Models([] if bundle is None else [str(bundle)], device="cpu"))
    config = Config(port=0, data=data, ballot=None if ballot is None else ballot.path, keys=keys)
    server = make_server(service, config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
