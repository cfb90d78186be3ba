"""Files for Grafana and Prometheus, made from the registry of metrics."""
