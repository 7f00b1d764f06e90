"""API keys: a file with a name and a hash a line; the keys themselves are nowhere."""

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from armchair.errors import RequestError

_LINE = re.compile(r"([\w.@-]{1,64}):([0-9a-f]{64})", re.ASCII)


class Keys:
    """Whose key is whose. Keys are made here, from 256 random bits, so that a plain hash is enough at rest."""

    def __init__(self, hashes: dict[str, str]):
        self.hashes = hashes

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """The keys of a file that `add_key` wrote. Raises RequestError for one that is missing, empty or other."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"cannot read API keys from {path}: {getattr(error, 'strerror', error)}") from None
        hashes = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            if (match := _LINE.fullmatch(line.strip())) is None:
                raise RequestError(
                    f"{path}, line {number}: expected NAME:SHA256 as armchair serve --add-key NAME writes it; "
                    "a key itself does not belong there"
                )
            hashes[match[1]] = match[2]
        if not hashes:
            raise RequestError(f"{path} has no API key: armchair serve --api-key-file {path} --add-key NAME makes one")
        return cls(hashes)

    def owner(self, key: str) -> str | None:
        """The name that a key belongs to, None for a wrong one. It takes as long whichever it is."""
        asked, found = _hash(key), None
        for name, known in self.hashes.items():
            if hmac.compare_digest(asked, known):
                found = name
        return found


def add_key(path: Path, name: str) -> str:
    """A new key for `name`, whose hash is added to the file at `path`. Raises RequestError for a name that is taken."""
    if not _LINE.fullmatch(f"{name}:{'0' * 64}"):
        raise RequestError(f"key name {name!r}: expected letters, digits and . _ @ -, 64 at most")
    if path.exists() and path.stat().st_size and name in Keys.read(path).hashes:
        raise RequestError(f"{path} has a key called {name!r}; take its line out to make a new one")
    key = f"armchair-{secrets.token_urlsafe(32)}"
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
            file.write(f"{name}:{_hash(key)}\n")
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None
    return key


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
