"""Data processing: sources, cleaning, versioned tables, splits, transforms, and the order in which rows are used.

Holds: the only door to Delta Lake (`delta`), the sources a table can be filled from, the cleaning plan and its
report, the split, the transforms fitted on the training rows, and the seeded order of the samples.
Never: torch, Ray Train, models. What leaves this room is Arrow tables, numpy arrays and plain JSON.
"""
