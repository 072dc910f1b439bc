"""A request as the prompt of a chat model, with its chat template, or as the beginning of a text for a base model.

Texts of one kind would all sound alike, so a request's seed chooses among several kinds.
"""

from typing import Any

from dskd.corpus.template_options import NOT_THINKING, TEMPLATE_OPTIONS
from dskd.corpus.written.requests import Request
from dskd.errors import UserError, reason_of
from dskd.lexicon.reading import is_storable
from dskd.lexicon.wordnet import PARTS_OF_SPEECH

THOUGHTS = "<think>"  # begins the thoughts of a reasoning model; an answer that is only thoughts becomes this alone
END_OF_THOUGHTS = "</think>"
_KINDS = ("two or three sentences", "two or three sentences of a story", "a short paragraph")


class WritingPrompter:
    """The prompts that make the model with this tokenizer write texts."""

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

    def text(self, request: Request, *, may_think: bool = False) -> str:
        """Returns the prompt as text; `may_think`: does not ask the model to skip its reasoning.

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
        options = TEMPLATE_OPTIONS if may_think else TEMPLATE_OPTIONS | NOT_THINKING
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options
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

    def answer(self, text: str, request: Request, *, may_think: bool = False) -> str:
        """Returns the text of an answer to the prompt of these arguments: what follows the thoughts and, of a base
        model, its first paragraph, since what follows is another text.

        It is `THOUGHTS` if the thoughts do not end, and empty if the answer has characters that are not text.
        """
        _, end, text = text.rpartition(END_OF_THOUGHTS)
        # Some templates begin the thoughts in the prompt.
        if THOUGHTS in text or (not end and self._begins_thoughts(request, may_think)):
            return THOUGHTS
        text = text.strip()
        if not is_storable(text):
            return ""
        return text if self.is_chat else text.split("\n\n")[0].strip()

    def _begins_thoughts(self, request: Request, may_think: bool) -> bool:
        prompt = self.text(request, may_think=may_think)
        return THOUGHTS in prompt.rpartition(END_OF_THOUGHTS)[2]
