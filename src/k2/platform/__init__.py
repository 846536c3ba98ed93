"""Kubeflow: the deployment file, rendered pipelines, the API server, schedules."""
