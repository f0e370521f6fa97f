"""Publishing, finding, verifying and promoting model versions, on both kinds of store."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import save

from lepton_ray.errors import ConflictError, IntegrityError, LeptonError, NotFoundError, RefusedError, UsageError
from lepton_ray.registry import ModelVersion, Registry, parse_ref
from lepton_ray.storage import Store, sha256_hex

CARD = {"task": {"name": "image_classification", "options": {}}, "metrics": {"accuracy": 0.97}}
TRANSFORMS = {"mean": [0.13], "std": [0.31]}
FILES = ["model.safetensors", "model.json", "transforms.json"]


def weights(value: float = 1.0) -> bytes:
    """Two small tensors."""
    return save({"conv.weight": np.full((2, 3), value, np.float32), "steps": np.array([7], np.int64)})


def publish(store: Store, model: str = "digits", value: float = 1.0) -> ModelVersion:
    """A version with these weights."""
    return Registry(store).publish(model, weights=weights(value), card=CARD, transforms=TRANSFORMS)


def key_of(number: int, name: str) -> str:
    """Where a file of a version of `digits` lies."""
    return f"models/digits/versions/{number}/{name}"


def test_published_version_loads_as_given(store: Store):
    """Weights, transforms and card come back; the card knows its model and version."""
    version = publish(store)
    loaded = Registry(store).load(version)
    assert (version.ref, version.model, version.number) == ("digits:1", "digits", 1)
    assert (loaded.weights, loaded.transforms) == (weights(), TRANSFORMS)
    assert loaded.card == version.card
    assert loaded.card | CARD == loaded.card
    assert (loaded.card["model"], loaded.card["version"]) == ("digits", 1)


def test_digest_is_that_of_the_manifest(store: Store):
    version = publish(store)
    data = store.get(key_of(1, "manifest.json"))
    assert version.digest == sha256_hex(data)
    files = json.loads(data)["files"]
    assert files["model.safetensors"] == {"size": len(weights()), "sha256": sha256_hex(weights())}
    assert sorted(files) == sorted(FILES)


def test_numbers_count_upwards(store: Store):
    assert [publish(store).number for _ in range(3)] == [1, 2, 3]
    assert publish(store, "other").number == 1
    assert Registry(store).models() == ["digits", "other"]
    assert [version.number for version in Registry(store).versions("digits")] == [1, 2, 3]


def test_racing_publishers_get_different_numbers(file_store: Store):
    """Eight at once: eight versions, each whole and with its own weights."""
    made: list[ModelVersion] = []
    threads = [
        threading.Thread(target=lambda value=value: made.append(publish(file_store, value=value))) for value in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(version.number for version in made) == list(range(1, 9))
    assert len({Registry(file_store).load(version).weights for version in made}) == 8


def test_version_without_manifest_does_not_exist(file_store: Store, monkeypatch: pytest.MonkeyPatch):
    """A publisher that dies before its last write leaves no version, and its number is not used again."""
    real = type(file_store).put_if_absent

    def dies_at_manifest(store: Store, key: str, data: bytes) -> str:
        if key.endswith("manifest.json"):
            raise KeyboardInterrupt
        return real(store, key, data)

    with monkeypatch.context() as patched:
        patched.setattr(type(file_store), "put_if_absent", dies_at_manifest)
        with pytest.raises(KeyboardInterrupt):
            publish(file_store)
    registry = Registry(file_store)
    assert file_store.exists(key_of(1, "model.safetensors"))
    assert registry.models() == []
    for ref in ("digits", "digits:1"):
        with pytest.raises(NotFoundError):
            registry.resolve(ref)
    with pytest.raises(RefusedError):
        registry.set_alias("digits", "champion", 1)
    assert publish(file_store).number == 2
    assert registry.resolve("digits").number == 2


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_any_flipped_bit_is_found(file_store: Store, name: str):
    """Each bit of each file, one at a time: neither verified nor loaded, and the file is named."""
    version = publish(file_store)
    data = bytearray(file_store.get(key_of(1, name)))
    for bit in range(0, 8 * len(data), 13):  # 13 and 8 have no common factor: all places in a byte come by
        data[bit // 8] ^= 1 << bit % 8
        file_store.put(key_of(1, name), bytes(data))
        data[bit // 8] ^= 1 << bit % 8
        for call in (Registry(file_store).load, Registry(file_store).verify):
            with pytest.raises(IntegrityError, match=name):
                call(version)
    file_store.put(key_of(1, name), bytes(data))
    Registry(file_store).verify(version)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_torn_and_missing_files_are_found(store: Store, name: str):
    version = publish(store)
    registry = Registry(store)
    data = store.get(key_of(1, name))
    for torn in (data[:-1], b"", data + b"\n"):
        store.put(key_of(1, name), torn)
        with pytest.raises(IntegrityError, match=name):
            registry.load(version)
    store.delete(key_of(1, name))
    with pytest.raises(IntegrityError, match=name):
        registry.verify(version)


@pytest.mark.parametrize("name", ["model.json", "manifest.json"])
def test_resolve_refuses_a_damaged_version(file_store: Store, name: str):
    """It does not fall back silently to an older one."""
    publish(file_store)
    publish(file_store)
    file_store.put(key_of(2, name), file_store.get(key_of(2, name))[:-2])
    for ref in ("digits", "digits:2"):
        with pytest.raises(IntegrityError, match=name):
            Registry(file_store).resolve(ref)
    assert Registry(file_store).resolve("digits:1").number == 1


@pytest.mark.parametrize(
    "change",
    [
        *({"format": 2}, {"model": "other"}, {"number": 7}, {"number": True}, {"created_at": 1}),
        *({"files": {}}, {"files": None}, {"files": {name: {"size": -1, "sha256": "0" * 64} for name in FILES}}),
        {"files": {"../../etc/passwd": {"size": 1, "sha256": "0" * 64}}},
    ],
)
def test_foreign_manifest_is_refused(file_store: Store, change: dict[str, object]):
    """A manifest of another version, format or shape, though it is proper JSON."""
    publish(file_store)
    manifest = json.loads(file_store.get(key_of(1, "manifest.json"))) | change
    file_store.put(key_of(1, "manifest.json"), json.dumps(manifest).encode())
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        Registry(file_store).resolve("digits:1")


def test_bare_name_means_champion_else_newest(store: Store):
    registry = Registry(store)
    publish(store)
    publish(store)
    assert registry.resolve("digits").number == 2
    assert registry.set_alias("digits", "champion", 1) is None
    assert registry.resolve("digits").number == 1
    assert registry.resolve("digits@champion").number == 1
    assert registry.resolve("digits:2").number == 2


def test_alias_keeps_its_history(store: Store):
    registry = Registry(store)
    first, second = publish(store), publish(store)
    registry.set_alias("digits", "champion", 1, reason="first")
    assert registry.set_alias("digits", "champion", 2, reason="better") == 1
    assert registry.set_alias("digits", "champion", 2, reason="again") == 2
    record = json.loads(store.get("models/digits/aliases/champion.json"))
    changes = [(change["version"], change["digest"], change["reason"]) for change in record["history"]]
    assert changes == [(1, first.digest, "first"), (2, second.digest, "better")]
    assert (record["alias"], record["model"], record["version"], record["digest"]) == (
        "champion",
        "digits",
        2,
        second.digest,
    )
    assert record["updated_at"] == record["history"][-1]["at"]
    assert registry.aliases("digits") == {"champion": 2}


def test_alias_only_to_a_sound_version(file_store: Store):
    """Missing or damaged: refused (exit code 4), and the alias stays where it was."""
    registry = Registry(file_store)
    publish(file_store)
    publish(file_store)
    registry.set_alias("digits", "champion", 1)
    file_store.put(key_of(2, "model.safetensors"), weights(2.0))
    for number, told in ((2, "model.safetensors"), (7, "versions there: 1, 2")):
        with pytest.raises(RefusedError, match=told) as caught:
            registry.set_alias("digits", "champion", number)
        assert caught.value.exit_code == 4
    assert registry.aliases("digits") == {"champion": 1}


def test_two_promotions_at_once_have_one_winner(file_store: Store, monkeypatch: pytest.MonkeyPatch):
    """Somebody moves the alias between our look and our write: theirs stands, we are told."""
    registry = Registry(file_store)
    for _ in range(3):
        publish(file_store)
    registry.set_alias("digits", "champion", 1)
    real, others = type(file_store).replace, [2]

    def overtaken(store: Store, key: str, data: bytes, etag: str) -> str:
        if others:
            Registry(store).set_alias("digits", "champion", others.pop())
        return real(store, key, data, etag)

    monkeypatch.setattr(type(file_store), "replace", overtaken)
    with pytest.raises(ConflictError, match="alias moved"):
        registry.set_alias("digits", "champion", 3)
    assert registry.aliases("digits") == {"champion": 2}


def test_alias_with_another_digest_is_refused(file_store: Store):
    """Somebody rewrote the version after it was promoted."""
    publish(file_store)
    Registry(file_store).set_alias("digits", "champion", 1)
    manifest = json.loads(file_store.get(key_of(1, "manifest.json")))
    file_store.put(key_of(1, "manifest.json"), json.dumps(manifest).encode())
    with pytest.raises(IntegrityError, match="digits@champion"):
        Registry(file_store).resolve("digits")


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"alias": "other"}', b"\xff"])
def test_damaged_alias_is_named(file_store: Store, damage: bytes):
    publish(file_store)
    file_store.put("models/digits/aliases/champion.json", damage)
    for call in (lambda r: r.resolve("digits"), lambda r: r.aliases("digits")):
        with pytest.raises(IntegrityError, match="digits@champion"):
            call(Registry(file_store))


def test_not_found_names_what_there_is(store: Store):
    registry = Registry(store)
    publish(store)
    publish(store)
    registry.set_alias("digits", "champion", 1)
    for ref, told in (
        ("letters", "models there: digits"),
        ("letters:1", "models there: digits"),
        ("digits:3", "versions there: 1, 2"),
        ("digits@canary", "aliases there: champion"),
    ):
        with pytest.raises(NotFoundError, match=told):
            registry.resolve(ref)


def test_empty_store_has_no_models(store: Store):
    registry = Registry(store)
    assert registry.models() == []
    assert registry.versions("digits") == []
    assert registry.aliases("digits") == {}
    with pytest.raises(NotFoundError, match="none"):
        registry.resolve("digits")


@pytest.mark.parametrize(
    "ref",
    [
        *("", ":", "@", "digits:", "digits@", "../digits", "digits/../x", "digits#1", "Digits", "a b", "x" * 64),
        *("digits:latest", "digits:0", "digits:-1", "digits:1.5", "digits:01", "digits:1#", "digits:\u0663"),
        *("digits:1000000000", "digits:" + "9" * 400, "digits\n", "d\u202e", "digits:1\n"),
        *("digits@../champion", "digits@a@b", "digits:1@champion", "digits@champion:1"),
    ],
)
def test_malformed_refs_are_told(file_store: Store, ref: str):
    """One printable line, exit code 2, and the store is not asked."""
    with pytest.raises(UsageError, match="model reference") as caught:
        parse_ref(ref)
    assert str(caught.value).isprintable()
    with pytest.raises(UsageError):
        Registry(file_store).resolve(ref)


@pytest.mark.parametrize("name", ["", "..", "A", "a/b", "a_b", "x" * 64])
def test_bad_names_write_nothing(file_store: Store, name: str):
    registry = Registry(file_store)
    calls: list[Callable[[], object]] = [
        lambda: registry.publish(name, weights=weights(), card=CARD, transforms=TRANSFORMS),
        lambda: registry.set_alias(name, "champion", 1),
        lambda: registry.set_alias("digits", name, 1),
        lambda: registry.aliases(name),
        lambda: registry.numbers(name),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="must match"):
            call()
    assert file_store.list("") == []


@pytest.mark.parametrize(
    "given",
    [
        *({"card": {"loss": float("nan")}}, {"transforms": {"mean": float("inf")}}, {"card": {"x": {1, 2}}}),
        *({"weights": b"\x80\x04."}, {"weights": b""}, {"weights": save({"w": np.array([np.nan], np.float32)})}),
    ],
)
def test_unfit_content_writes_nothing(file_store: Store, given: dict[str, object]):
    content = {"weights": weights(), "card": CARD, "transforms": TRANSFORMS} | given
    with pytest.raises(LeptonError) as caught:
        Registry(file_store).publish("digits", **content)
    assert caught.value.exit_code in (2, 4)
    assert file_store.list("") == []
