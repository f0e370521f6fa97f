"""Entry points for `ray job submit`: at most 40 lines each. They join rooms that must not know each other."""
