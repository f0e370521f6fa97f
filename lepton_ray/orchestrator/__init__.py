"""Runs that lost their driver go on: the service behind `lepton-ray orchestrate`.

Holds: what is to be done with a run whose driver is gone (pure), the ways to start its driver again, the watch that
joins the two.
Never: what a run does (training), how a failed worker group is replaced (the run's own driver does it), Kubernetes.
"""
