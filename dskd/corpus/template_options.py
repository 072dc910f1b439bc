"""The variables that chat templates get wherever a prompt or a chat is written."""

from datetime import UTC, datetime
from typing import Any

_DATE = datetime(2024, 7, 26, tzinfo=UTC)
# Some templates write the date into the prompt. With a fixed one, the same chats are written every day.
TEMPLATE_OPTIONS: dict[str, Any] = {"date_string": "26 Jul 2024", "strftime_now": _DATE.strftime}
# A prompt that asks for an answer asks models that can think first not to. Not all obey.
NOT_THINKING = {"enable_thinking": False}
