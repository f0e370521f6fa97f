"""Where rows come from: the built-in digits, files of tables, folders of media, rows in memory; local or on S3.

Holds: one module per format (`csv_files`, `json_lines`, `columnar`, `folders` with `coco` and `voc`, `memory`),
`shapes`, which alone decides what a source is, and `opening`, which gives its rows as a stream of tables.
Never: what becomes of the rows. Cleaning and tables know nothing of formats, and formats nothing of them.
"""

from lepton_ray.data.sources.memory import arrow_of
from lepton_ray.data.sources.opening import BUILT_IN, Source, accepted, open_source
from lepton_ray.data.sources.rejects import Rejected, Rejects

__all__ = ["BUILT_IN", "Rejected", "Rejects", "Source", "accepted", "arrow_of", "open_source"]
