"""The one door to `file://` and `s3://`: whole objects in and out, atomically, with compare-and-swap.

Holds: the `Store` interface, its two kinds (`local`, `s3`), hashing, retries. Everything else in the house reads and
writes through it, so a rule of durability is kept in one place. `inputs` finds and streams what others wrote.
Never: knowledge of what the bytes mean. No checkpoint, table, model or run is known here.
"""

from lepton_ray.storage.inputs import Found, Input, find_inputs
from lepton_ray.storage.store import Entry, Store, Stored, check_key, open_store, sha256_hex

__all__ = [
    "Entry",
    "Found",
    "Input",
    "Store",
    "Stored",
    "check_key",
    "find_inputs",
    "open_store",
    "sha256_hex",
]
