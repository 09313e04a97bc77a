"""A server process over the fake engine: python -m tests.server.serve_fake SECONDS_PER_TOKEN MODE

MODE: "ready", "slow" (it loads for ever), "broken" (loading fails), "deaf" (drain never returns).
Prints the port.
"""

import asyncio
import sys
import threading
import time

from tests.server.fake_engine import FakeEngine
from tramontane.errors import CheckpointError, TramontaneError
from tramontane.server.listener import open_socket, run_server
from tramontane.server.settings import ServerSettings
from tramontane.server.state import ServerState


class DeafEngine(FakeEngine):
    async def drain(self, seconds: float) -> None:
        await asyncio.sleep(1000)


def main(seconds_per_token: str, mode: str) -> int:
    def load() -> FakeEngine:
        if mode == "slow":
            threading.Event().wait()
        if mode == "broken":
            time.sleep(0.3)
            raise CheckpointError("a shard is missing")
        engine = DeafEngine if mode == "deaf" else FakeEngine
        return engine(seconds_per_token=float(seconds_per_token))

    state = ServerState(ServerSettings(port=0, shutdown_timeout=1.0))
    listening = open_socket(state.settings)
    print(listening.getsockname()[1], flush=True)
    try:
        asyncio.run(run_server(state, load, listening))
    except TramontaneError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
