"""Who may come in, and until when: the API key, and whether the server still takes requests."""

import hmac
from collections.abc import Mapping

from service.errors import Unauthenticated, Unavailable


class Door:
    """Open until `close()`. An empty `api_key` asks nobody for a key."""

    def __init__(self, api_key: str) -> None:
        self._key = api_key.encode()
        self.is_open = True

    @property
    def has_key(self) -> bool:
        return bool(self._key)

    def close(self) -> None:
        """From now on no request is accepted."""
        self.is_open = False

    def check_key(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises Unauthenticated unless the headers (names in lower case) bear the key."""
        if not self._key:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if not scheme:
            raise Unauthenticated("an API key is needed: Authorization: Bearer KEY", code="missing_api_key")
        # In constant time, so that the time to refuse says nothing about how much of a guess was right.
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            raise Unauthenticated("this API key is not the server's")

    def check_open(self) -> None:
        """Raises Unavailable when closed."""
        if not self.is_open:
            raise Unavailable("the server is draining and takes no new requests", code="draining")
