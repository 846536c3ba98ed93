"""What a run says about itself: events, terminal, Prometheus metrics, records, lineage, the HTML report."""
