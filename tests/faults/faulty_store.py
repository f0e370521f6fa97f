"""A store as one driver sees it: what the harness decides happens to its calls, and what it drops is in the history."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, TypeVar

from lepton_ray.errors import UnavailableError
from lepton_ray.storage import Store
from lepton_ray.storage.store import Entries, Names, Stored

T = TypeVar("T")
Deed = Literal["pass", "away", "lost", "die", "die_after"]
"""What is done with a call: `pass` it on; storage is `away` and nothing is done; it is done and its answer `lost`; the
caller is dead before it is done (`die`), or right after (`die_after`)."""
_MANIFEST = re.compile(r".*/step-([0-9]+)/manifest\.json")
_FOLDER = re.compile(r".*/step-([0-9]+)")


class Killed(BaseException):
    """The process is dead: nothing that it would do from now on is done. No `Exception`, so that nobody catches it."""


class FaultyStore(Store):
    """Passes calls on to `inner`, except where `decide` says otherwise.

    Args:
        inner: the store behind it.
        decide: what happens to a call, given whether it writes (puts, replaces and deletes) and its key. It may also
            block for as long as it likes: then the caller is frozen.
        dropped: called with the step, before a checkpoint's manifest is deleted.
    """

    def __init__(
        self, inner: Store, decide: Callable[[bool, str], Deed], dropped: Callable[[int], None] = lambda _: None
    ) -> None:
        self.uri = inner.uri
        self.dead = False
        """Whether the caller was killed."""
        self._inner, self._decide, self._dropped = inner, decide, dropped

    def get(self, key: str) -> bytes:
        """See Store."""
        return self._do(key, lambda: self._inner.get(key))

    def fetch(self, key: str) -> Stored:
        """See Store."""
        return self._do(key, lambda: self._inner.fetch(key))

    def put(self, key: str, data: bytes) -> str:
        """See Store."""
        return self._do(key, lambda: self._inner.put(key, data), writes=True)

    def put_if_absent(self, key: str, data: bytes) -> str:
        """See Store."""
        return self._do(key, lambda: self._inner.put_if_absent(key, data), writes=True)

    def replace(self, key: str, data: bytes, etag: str) -> str:
        """See Store."""
        return self._do(key, lambda: self._inner.replace(key, data, etag), writes=True)

    def exists(self, key: str) -> bool:
        """See Store."""
        return self._do(key, lambda: self._inner.exists(key))

    def list(self, prefix: str) -> Entries:
        """See Store."""
        return self._do(prefix, lambda: self._inner.list(prefix))

    def list_names(self, prefix: str) -> Names:
        """See Store."""
        return self._do(prefix, lambda: self._inner.list_names(prefix))

    def delete(self, key: str) -> None:
        """See Store."""

        def act() -> None:
            if found := _MANIFEST.fullmatch(key):
                self._dropped(int(found.group(1)))
            self._inner.delete(key)

        self._do(key, act, writes=True)

    def delete_prefix(self, prefix: str) -> int:
        """See Store."""

        def act() -> int:
            found = _FOLDER.fullmatch(prefix)
            if found and self._inner.exists(f"{prefix}/manifest.json"):
                self._dropped(int(found.group(1)))
            return self._inner.delete_prefix(prefix)

        return self._do(prefix, act, writes=True)

    def check_writable(self) -> None:
        """See Store."""
        self._inner.check_writable()

    def delta_uri(self, key: str) -> str:
        """See Store."""
        return self._inner.delta_uri(key)

    def delta_options(self) -> dict[str, str]:
        """See Store."""
        return self._inner.delta_options()

    def _do(self, key: str, act: Callable[[], T], *, writes: bool = False) -> T:
        if self.dead:
            raise Killed
        deed = self._decide(writes, key)
        if self.dead:  # killed while frozen
            raise Killed
        if deed == "away":
            raise UnavailableError(f"store {self.uri}: away, key {key}")
        if deed == "die":
            self.dead = True
            raise Killed
        done = act()
        if deed == "die_after":
            self.dead = True
            raise Killed
        if deed == "lost":
            raise UnavailableError(f"store {self.uri}: the answer was lost, key {key}")
        return done
