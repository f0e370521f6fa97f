"""`lepton-ray models`: list, show, trace, promote and verify model versions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from lepton_ray.cli.output import emit, json_option, store_option, table

if TYPE_CHECKING:
    from lepton_ray.registry import ModelVersion, Registry

ref_argument = click.argument("ref")
REF_HELP = "REF is MODEL (its champion, else its newest version), MODEL@ALIAS or MODEL:3."


@click.group(no_args_is_help=True)
def models() -> None:
    """List, show, promote and verify model versions."""


@models.command("list", short_help="All models with their versions and aliases.")
@json_option
@store_option
def list_models(as_json: bool, store_uri: str | None) -> None:
    """Show all models with their versions and aliases."""
    registry = _registry(store_uri)
    found = {model: _versions(registry, model) for model in registry.models()}
    rows = [
        (f"{model}:{row['version']}", ", ".join(row["aliases"]), row.get("created_at", ""), _metrics(row))
        for model, versions in found.items()
        for row in versions
    ]

    def words(console: Console) -> None:
        if rows:
            console.print(table(None, ("version", "aliases", "created", "metrics"), rows))
        else:
            console.print("no model yet; train one with lepton-ray train, or see lepton-ray demo")

    emit({"models": found}, as_json, words)


@models.command("show", short_help="Card and manifest of a version.", epilog=REF_HELP)
@ref_argument
@json_option
@store_option
def show(ref: str, as_json: bool, store_uri: str | None) -> None:
    """Show card and manifest of a version."""
    registry = _registry(store_uri)
    version = registry.resolve(ref)
    manifest = registry.manifest(version)
    aliases = _aliases_of(registry, version)

    def words(console: Console) -> None:
        console.print(f"{version.ref}  digest {version.digest}  aliases {', '.join(aliases) or 'none'}")
        console.print_json(data=version.card)
        for name, entry in manifest.files.items():  # no table: it would cut the hashes on a narrow terminal
            console.print(f"{entry.sha256}  {entry.size:>12}  {name}")

    result = {"ref": version.ref, "digest": version.digest, "aliases": aliases}
    emit({**result, "card": version.card, "manifest": manifest.to_dict()}, as_json, words)


@models.command("lineage", short_help="From which table, run and checkpoint a version came.", epilog=REF_HELP)
@ref_argument
@json_option
@store_option
def lineage(ref: str, as_json: bool, store_uri: str | None) -> None:
    """Trace a version back to its checkpoint, run and table."""
    version = _registry(store_uri).resolve(ref)
    told: dict[str, Any] = version.card.get("lineage") or {}
    chain: list[dict[str, Any]] = [
        {"link": "table", "name": _versioned(told, "table", "table_version"), "sha256": told.get("table_fingerprint")},
        {"link": "run", "name": told.get("run"), "sha256": told.get("settings_sha256")},
        {"link": "checkpoint", "name": f"step {told['step']}" if "step" in told else None, "sha256": None},
        {"link": "model version", "name": version.ref, "sha256": version.digest},
    ]
    if told.get("parent"):  # a compressed version: its parent is what was trained
        chain.insert(3, {"link": "parent", "name": told["parent"], "sha256": told.get("parent_digest")})

    def words(console: Console) -> None:
        for row in chain:
            console.print(f"{row['link']:<14} {row['name'] or 'not recorded':<20} {row['sha256'] or ''}".rstrip())
        rest = {key: value for key, value in told.items() if key in ("attempt", "code_version")}
        console.print(", ".join(f"{key} {value}" for key, value in rest.items()))

    emit({"ref": version.ref, "chain": chain, "lineage": told}, as_json, words)


@models.command("promote", short_help="Point an alias at a version.", epilog=REF_HELP)
@ref_argument
@click.argument("alias")
@click.option("--reason", default="", help="Kept in the history of the alias.")
@json_option
@store_option
def promote(ref: str, alias: str, reason: str, as_json: bool, store_uri: str | None) -> None:
    """Verify a version and point ALIAS at it."""
    registry = _registry(store_uri)
    version = registry.resolve(ref)
    before = registry.set_alias(version.model, alias, version.number, reason=reason)
    was = f"version {before}" if before is not None else "not set"
    result = {"model": version.model, "alias": alias, "version": version.number, "before": before}
    emit(
        {**result, "digest": version.digest},
        as_json,
        lambda console: console.print(f"{version.model}@{alias} is version {version.number} now; it was {was}"),
    )


@models.command("verify", short_help="Hash every file of a version again.", epilog=REF_HELP)
@ref_argument
@json_option
@store_option
def verify(ref: str, as_json: bool, store_uri: str | None) -> None:
    """Read every file of a version and compare it with the manifest."""
    registry = _registry(store_uri)
    version = registry.resolve(ref)
    registry.verify(version)
    files = registry.manifest(version).to_dict()["files"]
    size = sum(entry["size"] for entry in files.values())
    emit(
        {"ref": version.ref, "digest": version.digest, "verified": True, "files": files},
        as_json,
        lambda console: console.print(f"{version.ref}: {len(files)} files, {size} bytes, all as the manifest says"),
    )


def _registry(store_uri: str | None) -> Registry:
    from lepton_ray.registry import Registry
    from lepton_ray.storage import open_store

    return Registry(open_store(store_uri))


def _aliases_of(registry: Registry, version: ModelVersion) -> list[str]:
    return [alias for alias, number in registry.aliases(version.model).items() if number == version.number]


def _versions(registry: Registry, model: str) -> list[dict[str, Any]]:
    """A row per version, newest first; a damaged one is shown as such and does not hide the others."""
    from lepton_ray.errors import IntegrityError

    aliases = registry.aliases(model)
    rows = []
    for number in reversed(registry.numbers(model)):
        row: dict[str, Any] = {"version": number, "aliases": [name for name, n in aliases.items() if n == number]}
        try:
            version = registry.version(model, number)
            row |= {"digest": version.digest, "created_at": version.card.get("created_at")}
            row |= {"task": version.card.get("task"), "metrics": version.card.get("metrics")}
        except IntegrityError as error:
            row |= {"damaged": str(error)}
        rows.append(row)
    return rows


def _metrics(row: dict[str, Any]) -> str:
    """The metrics of a row in one cell."""
    if "damaged" in row:
        return f"DAMAGED: {row['damaged']}"
    metrics = row.get("metrics") or {}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
    )


def _versioned(told: dict[str, Any], name: str, version: str) -> str | None:
    """`digits@3` from two entries of the lineage, where both are recorded."""
    return f"{told[name]}@{told[version]}" if name in told and version in told else None
