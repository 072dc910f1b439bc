"""A request as the prompt of a chat model, with its chat template, or as the beginning of a text for a base model.

Texts of one kind would all sound alike, so a request's seed chooses among several kinds.
"""

from typing import Any

from dskd.corpus.chats.rendering import TEMPLATE_OPTIONS
from dskd.corpus.written.requests import PARTS_OF_SPEECH, Request
from dskd.errors import UserError, reason_of
from dskd.lexicon.reading import is_storable

_KINDS = ("two or three sentences", "two or three sentences of a story", "a short paragraph")


class Prompter:
    """A writer of prompts for the model with this tokenizer."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        """Takes the teacher's tokenizer and the seed of the experiment."""
        self._tokenizer = tokenizer
        self._seed = seed
        self.is_chat = bool(getattr(tokenizer, "chat_template", None))

    def question(self, request: Request) -> str:
        """Returns the request in words, as the user of a chat would write it."""
        sense = request.sense
        kind = _KINDS[request.seed(self._seed) % len(_KINDS)]
        part = PARTS_OF_SPEECH[sense.part_of_speech]
        # Small models use the word more often if it comes before its meaning, and again at the end.
        return (
            f'"{sense.word}" ({part}) means: {sense.gloss}.\n\nWrite {kind} with the word "{sense.word}" in this sense.'
        )

    def text(self, request: Request) -> str:
        """Returns the prompt as text.

        Raises:
            UserError: when the chat template refuses the question.
        """
        sense = request.sense
        if not self.is_chat:
            return (
                f"{sense.word} ({PARTS_OF_SPEECH[sense.part_of_speech]}): {sense.gloss}.\n"
                f'A text that uses "{sense.word}" in this sense:\n'
            )
        messages = [{"role": "user", "content": self.question(request)}]
        try:
            # Models that can think before they answer are asked not to: thoughts are no text to learn from.
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False, **TEMPLATE_OPTIONS
            )
        except Exception as error:  # templates can raise any kind of error
            raise UserError(
                f"{self._tokenizer.name_or_path}: its chat template refuses a chat of one question "
                f"({reason_of(error)}), with which corpus.source: teacher asks for texts; use another chat template"
            ) from None
        return text

    def tokens(self, request: Request) -> list[int]:
        """Returns the token ids of the prompt; raises the errors of :meth:`text`."""
        # A chat template writes all special tokens itself.
        ids: list[int] = self._tokenizer(self.text(request), add_special_tokens=not self.is_chat, verbose=False)[
            "input_ids"
        ]
        return ids

    def answer(self, text: str) -> str:
        """Returns the text of an answer: of a base model its first paragraph, since what follows is another text.

        It is empty if the answer has characters that are not text.
        """
        text = text.rpartition("</think>")[2].strip()
        if not is_storable(text):
            return ""
        return text if self.is_chat else text.split("\n\n")[0].strip()
