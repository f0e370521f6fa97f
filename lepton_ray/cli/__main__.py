"""`python -m lepton_ray.cli`: the same as `lepton-ray`."""

from lepton_ray.cli.main import main

main()
