"""Where every worker-second went: the only room that knows Prometheus.

Holds: the catalogue of metrics, the recorder that ranks and replicas write with, the goodput ledger, the exporter,
the run report, and the alerts and dashboards that rest on the catalogue. A failure in monitoring never reaches
training or serving.
Never: decisions. This room measures and shows; it does not act.
"""
