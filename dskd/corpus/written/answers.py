"""Reads the answers of a server with OpenAI's chat completions: the names of its models, and texts."""

import json
from typing import Any

from requests import Response

from dskd.corpus.written.prompts import END_OF_THOUGHTS, THOUGHTS

_TYPES_OF_TEXT = (None, "text", "output_text")  # of the parts of a content


class UnreadableAnswerError(Exception):
    """An answer with status 200 that has no text, or that reports an error.

    Its message follows the URL in a sentence, and may contain the server's key.
    """


def read_models(response: Response) -> list[str]:
    """Returns the names of a server's models; none if the answer has no list of models.

    Raises:
        UnreadableAnswerError: if the answer is not JSON.
    """
    answer = _json(response.content)
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list):
        return []
    return [str(model["id"]) for model in models if isinstance(model, dict) and "id" in model]


def read_text(response: Response) -> str:
    """Returns the text of a chat completion; some servers send it as a stream although none was requested.

    Raises:
        UnreadableAnswerError: if the answer breaks off, or is not a chat completion.
    """
    if response.headers.get("Content-Type", "").startswith("text/event-stream"):
        return _read_stream(response.content.decode("utf-8", "replace"))
    answer = _json(response.content)
    message = _first_choice(answer).get("message")
    if not isinstance(message, dict) or "content" not in message:
        raise _no_completion(answer)
    return _with_thoughts(_thoughts_of(message), _text_of(message["content"]))


def _read_stream(stream: str) -> str:
    thoughts: list[str] = []
    parts: list[str] = []
    for line in stream.splitlines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return _with_thoughts("".join(thoughts), "".join(parts))
        event = _json(data)
        if not isinstance(event, dict) or event.get("error"):
            raise UnreadableAnswerError(f"fails while it answers ({_shown(event)})")
        if not event.get("choices"):  # such as the last event, with the number of tokens
            continue
        choice = _first_choice(event)
        delta = choice.get("delta") or {}
        if not isinstance(delta, dict):
            raise _no_completion(event)
        thoughts.append(_thoughts_of(delta))
        parts.append(_text_of(delta.get("content")))
        if choice.get("finish_reason"):
            return _with_thoughts("".join(thoughts), "".join(parts))
    raise UnreadableAnswerError("breaks off its answer")


def _json(content: bytes | str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):  # it breaks off, or is not JSON
        raise UnreadableAnswerError("answers with something that is not JSON") from None


def _first_choice(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _no_completion(answer)
    choice: dict[str, Any] = choices[0]
    return choice


def _no_completion(answer: Any) -> UnreadableAnswerError:
    return UnreadableAnswerError(f"answers with something that is not a chat completion ({_shown(answer)})")


def _text_of(content: Any) -> str:
    """Returns the text of a content, which may be a list of parts; "" if it has none."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") in _TYPES_OF_TEXT]
        return "".join(text for part in parts if isinstance(text := part.get("text"), str))
    return content if isinstance(content, str) else ""


def _thoughts_of(message: dict[str, Any]) -> str:
    """Returns the thoughts that the server has separated from an answer; "" if it has not."""
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    return thoughts if isinstance(thoughts, str) else ""


def _with_thoughts(thoughts: str, content: str) -> str:
    """Returns thoughts and an answer, marked as models mark them, so that :class:`WritingPrompter` finds their end."""
    if not thoughts:
        return content
    return f"{THOUGHTS}{thoughts}{END_OF_THOUGHTS}{content}" if content else f"{THOUGHTS}{thoughts}"


def _shown(answer: Any) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
