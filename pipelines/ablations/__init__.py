"""Studies as pipelines."""
