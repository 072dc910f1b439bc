"""What every section of a configuration is."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict

EXPANDED = "environment variables are expanded"
# A path in a config file, in which $NAME and ${NAME} stand for environment variables (dskd/config/reading.py).
PathText = Annotated[str, EXPANDED]


class Section(BaseModel):
    """A part of the configuration: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def as_dict(self) -> dict[str, Any]:
        """The section as plain JSON-like data."""
        return self.model_dump(mode="json")
