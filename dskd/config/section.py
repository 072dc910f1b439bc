"""The base class of the sections of a configuration, and the type of their paths."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict

GB = 2**30  # bytes, in this project
EXPANDED = "environment variables are expanded"
# A path in a config file; dskd/config/reading.py expands the environment variables $NAME and ${NAME} in it.
PathText = Annotated[str, EXPANDED]


class Section(BaseModel):
    """A part of the configuration: immutable, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def as_dict(self) -> dict[str, Any]:
        """Returns the section as plain JSON-like data."""
        return self.model_dump(mode="json")
