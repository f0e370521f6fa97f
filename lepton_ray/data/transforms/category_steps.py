"""Steps on values out of a set: one-hot, numbers by the values learnt, and numbers by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from lepton_ray.data.cleaning.fitting import MostFrequent
from lepton_ray.data.cleaning.steps import array_of
from lepton_ray.data.transforms.step import Transform, codes_of, family, replaced, vectors, with_field
from lepton_ray.errors import UsageError, shown
from lepton_ray.settings import transforms as settings
from lepton_ray.settings.node import Node


class Known(Node):
    """The values that were learnt, in order, by column."""

    values: dict[str, list[settings.Value]]


class Learnt(Transform[Any]):
    """A step that learns the values of its columns."""

    Learnt = Known
    kinds = "number or text or bool"

    def check(self, schema: pa.Schema) -> pa.Schema:
        """See Transform."""
        for name in self.columns:
            if name in schema.names and pa.types.is_floating(schema.field(name).type):
                kind = schema.field(name).type
                raise UsageError(
                    f"{self.where()}: column {shown(name)} holds {kind}; expected text, whole numbers or bool"
                )
        return super().check(schema)

    def fitting(self) -> MostFrequent:
        """See Transform."""
        return MostFrequent(self.columns, counts=True)

    def learn(self, result: Any) -> Known:
        """See Transform."""
        made = {}
        for name in self.columns:
            counts: Mapping[Any, int] = result[name]
            kept = sorted(
                (value for value, count in counts.items() if count >= self.settings.min_rows),
                key=lambda value: (-counts[value], value),
            )
            if not kept:
                raise UsageError(
                    f"{self.where()}: no value of column {shown(name)} has {self.settings.min_rows} rows; lower "
                    "min_rows or leave the column out"
                )
            made[name] = sorted(kept[: self.settings.max_values])
        return Known(values=made)


class OneHot(Learnt):
    """See `settings.transforms.OneHot`. A column becomes lists of float32."""

    def after(self, schema: pa.Schema) -> pa.Schema:
        """See Transform. The width is known when it is learnt."""
        for name in self.columns:
            schema = with_field(schema, name, pa.list_(pa.float32()))
        return schema

    def apply(self, rows: pa.Table, learnt: Known) -> pa.Table:
        """See Transform."""
        for name in self.columns:
            known = learnt.values[name]
            codes = codes_of(array_of(rows, name), known)
            made = (codes[:, None] == np.arange(len(known), dtype=np.int32)).astype(np.float32)
            rows = replaced(rows, name, vectors(made))
        return rows


class Ordinal(Learnt):
    """See `settings.transforms.Ordinal`. A column becomes int32."""

    def after(self, schema: pa.Schema) -> pa.Schema:
        """See Transform."""
        for name in self.columns:
            schema = with_field(schema, name, pa.int32())
        return schema

    def apply(self, rows: pa.Table, learnt: Known) -> pa.Table:
        """See Transform."""
        for name in self.columns:
            codes = codes_of(array_of(rows, name), learnt.values[name])
            rows = replaced(rows, name, pa.array(codes + np.int32(1)))
        return rows


class Hashing(Transform[settings.Hashing]):
    """See `settings.transforms.Hashing`. A column becomes int32. The same value of two columns has two hashes."""

    kinds = "number or text or bool"

    def after(self, schema: pa.Schema) -> pa.Schema:
        """See Transform."""
        for name in self.columns:
            if pa.types.is_floating(schema.field(name).type):
                raise UsageError(f"{self.where()}: column {shown(name)} holds floating point numbers; expected values "
                                 "out of a set")  # fmt: skip
            schema = with_field(schema, name, pa.int32())
        return schema

    def apply(self, rows: pa.Table, learnt: Any) -> pa.Table:
        """See Transform."""
        for name in self.columns:
            encoded = array_of(rows, name).dictionary_encode()
            buckets = [self._bucket(name, value) for value in encoded.dictionary.to_pylist()]
            places = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
            # the last place stands for -1, which is a missing value
            made = np.array([*buckets, 0], np.int32)[places]
            rows = replaced(rows, name, pa.array(made))
        return rows

    def _bucket(self, name: str, value: Any) -> int:
        text = f"{name}\x00{family(pa.scalar(value).type)}\x00{value}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return 1 + int.from_bytes(digest, "little") % self.settings.buckets
