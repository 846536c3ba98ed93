"""The child of `k2 run`: kfp's local runner over the same DAG that a cluster runs."""

import importlib
import json
import os
import sys
import warnings

from k2.processes import end_with_run


def main(pipeline: str, pipeline_root: str) -> None:
    """Run `pipelines/<pipeline>.py` as the request on stdin says. Raises whatever kfp raises when a task fails.

    The request is JSON: `parameters` of the pipeline, `environment` of the steps, and `python`, which starts a step.
    It is read late: importing kfp takes as long as starting an object store.
    """
    end_with_run()
    warnings.filterwarnings("ignore", message=".*may not be", category=RuntimeWarning)
    from kfp import local

    module = importlib.import_module(f"pipelines.{pipeline.replace('/', '.')}")
    request = json.load(sys.stdin)
    os.environ.update(request["environment"])
    sys.executable = request["python"]
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=pipeline_root)
    getattr(module, pipeline.rpartition("/")[2])(**request["parameters"])


if __name__ == "__main__":
    main(*sys.argv[1:])
