"""Who may ask: API keys, and the names and pages through which a browser may reach the server."""

import hmac
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from hashlib import sha256

from tramontane.server.errors import ApiError

Headers = Sequence[tuple[bytes, bytes]]
_LOCAL_NAMES = ("localhost",)


class KeyRing:
    """The keys that open the server; without any it is open to whoever reaches it."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def find_tenant(self, headers: Headers) -> str:
        """A name of the key in the Authorization header, "" if there are no keys.

        Raises ApiError 401. All keys are compared, each in constant time.
        """
        if not self._digests:
            return ""
        given = sha256(_read_bearer(headers)).digest()
        found = b""
        for digest in self._digests:
            if hmac.compare_digest(digest, given):
                found = digest
        if not found:
            raise _refuse("this API key is not known here")
        return found.hex()[:16]


def _read_bearer(headers: Headers) -> bytes:
    values = get_all(headers, b"authorization")
    if not values:
        raise _refuse("there is no API key: send the header Authorization: Bearer KEY")
    scheme, _, key = values[0].partition(b" ")
    if len(values) > 1 or scheme.lower() != b"bearer" or not key:
        raise _refuse("send one Authorization header, of the form: Bearer KEY")
    return key


def _refuse(message: str) -> ApiError:
    headers = {"www-authenticate": "Bearer"}
    return ApiError(
        401, message, type="authentication_error", code="invalid_api_key", headers=headers
    )


class HostPolicy:
    """Refuses names and origins that are not the server's own.

    A page of another site can make a browser send requests here, and, if its name resolves to this
    machine (DNS rebinding), read the answers. Such a request has a foreign Origin or a foreign
    Host; an address of numbers is no name, and cannot be rebound.
    """

    def __init__(self, *, bound: str, hosts: Iterable[str], origins: Iterable[str]) -> None:
        names = {*_LOCAL_NAMES, socket.gethostname().lower(), bound.lower()}
        self._hosts = names | {host.lower() for host in hosts}
        self._origins = {origin.lower().rstrip("/") for origin in origins}

    def check(self, headers: Headers) -> str | None:
        """The foreign origin that is allowed, or None. Raises ApiError 403."""
        host = self._check_host(headers)
        values = get_all(headers, b"origin")
        if not values:
            return None
        origin = values[0].decode("latin-1")
        if len(values) == 1 and origin.lower() in (f"http://{host}", f"https://{host}"):
            return None
        if len(values) == 1 and ("*" in self._origins or origin.lower() in self._origins):
            return origin
        raise _forbid(
            f"pages of {origin!r} may not use this server; its operator can allow them with "
            f"--allowed-origin",
            code="origin_not_allowed",
        )

    def _check_host(self, headers: Headers) -> str:
        values = get_all(headers, b"host")
        if len(values) != 1:
            raise _forbid("send one Host header", code="host_not_allowed")
        host = values[0].decode("latin-1").lower()
        name = _strip_port(host)
        if not (_is_address(name) or name in self._hosts or "*" in self._hosts):
            raise _forbid(
                f"{name!r} is not a name of this server; its operator can add it with "
                f"--allowed-host",
                code="host_not_allowed",
            )
        return host


def get_all(headers: Headers, name: bytes) -> list[bytes]:
    """The values of all headers of a name, which is in lower case."""
    return [value for key, value in headers if key == name]


def _forbid(message: str, *, code: str) -> ApiError:
    return ApiError(403, message, type="permission_error", code=code)


def _strip_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0][1:]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
