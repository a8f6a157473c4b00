"""What a client may send, and how long it may take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bytes a request may have, and seconds a client may take; a connection that is over is closed."""

    max_body_bytes: int
    max_head_bytes: int = 65_536
    receive_seconds: float = 30.0  # from a request's first byte to its last
    idle_seconds: float = 75.0  # between requests; more than the 60 s of common balancers, so that they close first
    stalled_seconds: float = 30.0  # a client that does not read its reply
    linger_seconds: float = 2.0  # to read on after refusing a request, or the client would lose the reply
    sweep_seconds: float = 1.0  # how often the times above are looked at
