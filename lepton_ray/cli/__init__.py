"""The `lepton-ray` command: one file per command group.

Holds: parsing, then importing, then one call into the room that does the work, then printing.
Never: logic of its own; whatever is worth testing without a terminal lives in a room below. `--help` of every command
answers without importing torch or Ray.
"""
