"""What a job is asked to make: kept in the store, so that the job's own object stays small."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from k2.errors import StageError
from k2.store.client import Store


class Work(BaseModel):
    """One stage with its configuration and inputs.

    Attributes:
        config: the stage's own section, complete.
        inputs: input name -> URI of an artifact.
        key: names what comes of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    preset: str = ""
    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    key: str

    @property
    def location(self) -> str:
        """Its name in the store."""
        return f"runs/{self.run}/jobs/{self.stage}-{self.key}.json"

    def save(self, store: Store) -> None:
        """Put it where the job finds it."""
        store.put(self.location, self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, store: Store, location: str) -> Self:
        """What was saved.

        Raises:
            StageError: nothing was.
        """
        body = store.get(location)
        if body is None:
            raise StageError(f"{store.url(location)}: what this job is to make is not there; launch it again")
        return cls.model_validate_json(body)
