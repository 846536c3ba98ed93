"""The child of `k2 run`: kfp's local runner over the same DAG that a cluster runs."""

import json
import sys
import warnings

from k2.execution.process import die_with_parent


def main(pipeline_root: str) -> None:
    """Run the pipeline with the parameters given as JSON on stdin. Raises whatever kfp raises when a task fails."""
    die_with_parent()
    warnings.filterwarnings("ignore", message=".*may not be", category=RuntimeWarning)
    from kfp import local

    from pipelines.k2 import k2

    parameters = json.load(sys.stdin)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=pipeline_root)
    k2(**parameters)


if __name__ == "__main__":
    main(sys.argv[1])
