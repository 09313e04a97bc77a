"""How routes find what belongs to their application."""

from fastapi import Request

from tramontane.server.state import ServerState


def get_state(http: Request) -> ServerState:
    """The state that `build_app` was given."""
    state: ServerState = http.app.state.server
    return state
