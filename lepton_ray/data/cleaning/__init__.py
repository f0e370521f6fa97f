"""Cleaning: what is left out when a table is filled, and the declared plans that make a cleaner version of one.

`ingesting` judges rows on their way in. A plan (`lepton_ray.settings.cleaning`) is carried out by `table`: `steps`
says what each step does to a piece of a table, `fitting` learns what needs all rows, `passes` runs the pieces here or
on Ray Data. The work on values is pure and vectorised: `rules`, `expressions`, `text`, `media`, `quantiles`,
`duplicates`, `near`.
"""

from lepton_ray.data.cleaning.ingesting import KEY, LABEL, MAX_LABELS, Cleaner, CleaningReport

__all__ = ["KEY", "LABEL", "MAX_LABELS", "Cleaner", "CleaningReport"]
