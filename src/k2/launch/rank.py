"""One process of a job: it makes the stage that its launcher asked for, alone or with the other ranks.

python -m k2.launch.rank runs/RUN/jobs/STAGE-KEY.json
"""

import sys

from k2.config.k2 import K2Config
from k2.errors import UserError
from k2.execution.component import leave
from k2.execution.runner import execute, key_of
from k2.launch.work import Work
from k2.masking import install
from k2.monitoring.events import progress_for
from k2.store.artifacts import open_uri
from k2.store.client import Store


def main(location: str) -> None:
    """Run the stage and publish its artifact.

    Raises:
        SystemExit: 2 for a user error, 1 for any other.
    """
    install()
    try:
        make(Store.from_environment(), location)
    except BaseException as error:
        leave(error)


def make(store: Store, location: str) -> None:
    """Make what the object at `location` asks for.

    Raises:
        UserError: this image's code or packages would make something else than the launcher waits for.
    """
    work = Work.load(store, location)
    section = K2Config.model_fields[work.stage].annotation
    assert section is not None
    config = section.model_validate(work.config)
    inputs = {name: open_uri(store, uri) for name, uri in work.inputs.items()}
    if key_of(work.stage, config, inputs, store) != work.key:
        raise UserError(
            f"{work.stage}: the launcher's image and the job's have different code or packages; build both from the"
            " same revision"
        )
    execute(work.stage, config, inputs, store, progress_for(work.stage))


if __name__ == "__main__":
    main(sys.argv[1])
