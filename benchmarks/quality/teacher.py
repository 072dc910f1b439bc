"""The teacher as transformers loads it, and the students that are cut from it.

A student's frozen lower layers see nothing that changes, so their output is computed once and kept in a file. What is
left of a student is its upper layers, which start from there.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from benchmarks.quality.settings import Settings
from dskd.config import Config, StudentConfig
from dskd.models.files.folder import ModelFolder, find_teacher
from dskd.students.measuring import measure_importance
from dskd.students.spacing import Importance, choose_layers, num_removed_layers

if TYPE_CHECKING:
    from benchmarks.quality.text import Text

_BATCH = 8  # sequences, whose states are computed at once


@dataclass(frozen=True)
class Teacher:
    """A causal LM in float32 with a Llama's modules: `model.layers`, `model.norm`, `model.embed_tokens`, `lm_head`."""

    causal_lm: Any
    tokenizer: Any
    config: Config
    _importance: dict[int, Importance] = field(default_factory=dict)  # by the number of layers that are removed

    @classmethod
    def load(cls, config: Config, device: str = "cpu") -> "Teacher":
        """Loads the teacher of a config to a device, on which its students are trained."""
        from transformers import AutoModelForCausalLM

        folder: ModelFolder = find_teacher(config)
        model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32, attn_implementation="sdpa")
        return cls(model.eval().requires_grad_(False).to(device), folder.tokenizer, config)

    @property
    def num_layers(self) -> int:
        """The number of its layers."""
        return len(self.causal_lm.model.layers)

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
        return self.output_matrix.device

    @property
    def output_matrix(self) -> torch.Tensor:
        """The output matrix [V, D]."""
        matrix: torch.Tensor = self.causal_lm.get_output_embeddings().weight
        return matrix

    def kept_layers(self, settings: Settings) -> list[int]:
        """Returns which layers a student keeps, as `dskd student` chooses them."""
        student = StudentConfig(layers=settings.layers, spacing=settings.keep, train_layers=settings.train_layers)
        importance = None
        if student.is_measured:
            config = self.config.model_copy(update={"student": student})
            removed = num_removed_layers(student, self.num_layers)
            if removed not in self._importance:  # measuring takes as long as half a training
                self._importance[removed] = measure_importance(config, find_teacher(config), removed)
            importance = self._importance[removed]
        return choose_layers(student, self.num_layers, importance)


class Student(nn.Module):
    """The upper layers of a student, some or all of which are trained, the final norm, and the output matrix."""

    def __init__(self, teacher: Teacher, settings: Settings) -> None:
        """Copies what is trained from the teacher."""
        super().__init__()
        kept = teacher.kept_layers(settings)
        split = len(kept) - settings.train_layers
        self.frozen, self.upper = tuple(kept[:split]), tuple(kept[split:])
        self.decoder = _decoder(teacher, self.upper).requires_grad_(False)
        self.decoder.layers.requires_grad_(True)
        self.decoder.norm.requires_grad_(settings.train_norm)
        matrix = teacher.output_matrix
        self.output_matrix = nn.Parameter(
            matrix.clone() if settings.train_head else matrix, requires_grad=settings.train_head
        )

    def forward(self, states: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns the last hidden states [B, T, D], after the final norm, of states that enter the upper layers."""
        return _run(self.decoder, states, position_ids, mask)

    def forward_from_middle(
        self, states: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what :meth:`forward` does, and the states after the lowest trained layer, with the final norm."""
        found: list[Any] = []
        hook = self.decoder.layers[0].register_forward_hook(lambda *call: found.append(call[-1]))
        with hook:
            last = self(states, position_ids, mask)
        middle = found[0][0] if isinstance(found[0], tuple) else found[0]  # a tuple in older transformers
        return last, self.decoder.norm(middle)

    def trained(self) -> dict[str, nn.Parameter]:
        """Returns the trained parameters by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def lower_states(teacher: Teacher, layers: tuple[int, ...], text: "Text", folder: Path) -> torch.Tensor:
    """Returns the states [S, T, D] that leave the frozen lower layers of a student.

    They are those in the shards if the layers are the same; otherwise they are computed once and kept in `folder`.
    """
    if layers == tuple(range(text.trunk_depth)):
        return text.trunk_states
    from safetensors.torch import load_file, save_file

    from benchmarks.quality.text import file_of_text

    file = file_of_text(folder, "lower", text, "-".join(map(str, layers)) or "embeddings")
    if not file.is_file():
        states = run_layers(teacher, layers, text)
        partial = file.with_suffix(".partial")
        save_file({"states": states}, partial)
        partial.rename(file)
    return load_file(file)["states"]


class Sequences(Protocol):
    """Token ids [S, T] with the positions of their documents."""

    @property
    def input_ids(self) -> torch.Tensor: ...  # noqa: D102

    @property
    def position_ids(self) -> torch.Tensor: ...  # noqa: D102

    def attention_mask(self, at: torch.Tensor) -> torch.Tensor: ...  # noqa: D102


class Rows:
    """Token ids of which every row is one document."""

    input_ids: torch.Tensor  # [n, T] int64, padded at the end

    @property
    def position_ids(self) -> torch.Tensor:
        """The positions [n, T]."""
        return torch.arange(self.input_ids.shape[1]).expand_as(self.input_ids)

    def attention_mask(self, at: torch.Tensor) -> torch.Tensor:
        """Returns which positions each position of the rows `at` sees: those before it, and itself."""
        length = self.input_ids.shape[1]
        return torch.ones(length, length, dtype=torch.bool).tril().expand(len(at), 1, -1, -1)


@torch.no_grad()
def run_layers(
    teacher: Teacher,
    layers: tuple[int, ...],
    sequences: Sequences,
    states: torch.Tensor | None = None,
    *,
    with_norm: bool = False,
) -> torch.Tensor:
    """Returns the states [S, T, D] that leave these layers of the teacher, on the CPU.

    Args:
        teacher: the teacher.
        layers: its layers to run; without any, what enters them is returned.
        sequences: the tokens.
        states: the states [S, T, D] that enter them; None for the embeddings of the tokens.
        with_norm: apply the final norm.
    """
    embedded = teacher.causal_lm.model.embed_tokens
    decoder = _decoder(teacher, layers, copied=False)
    if not with_norm:
        decoder.norm = nn.Identity()
    parts = []
    for at in torch.arange(len(sequences.input_ids)).split(_BATCH):
        entering = embedded(sequences.input_ids[at].to(teacher.device)) if states is None else states[at]
        if layers:
            entering = _run(decoder, entering, sequences.position_ids[at], sequences.attention_mask(at))
        parts.append(entering.cpu())
    return torch.cat(parts)


def _decoder(teacher: Teacher, layers: tuple[int, ...], *, copied: bool = True) -> Any:
    """Returns the teacher's decoder with these layers alone and without embeddings."""
    model = teacher.causal_lm.model
    decoder = copy.copy(model)  # the modules are shared, except for those that are replaced here
    decoder._modules = dict(model._modules)
    chosen = [model.layers[layer] for layer in layers]
    decoder.layers = nn.ModuleList(copy.deepcopy(chosen) if copied else chosen)
    decoder.norm = copy.deepcopy(model.norm) if copied else model.norm
    decoder.embed_tokens = nn.Identity()
    decoder.config = copy.copy(model.config)
    decoder.config.num_hidden_layers = len(layers)
    return decoder


def _run(decoder: Any, states: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # All data is on the CPU, and a batch of it is small. A mask of four dimensions is taken as it is: True where a
    # position sees another.
    states, position_ids, mask = (each.to(decoder.device) for each in (states, position_ids, mask))
    output = decoder(inputs_embeds=states, position_ids=position_ids, attention_mask=mask, use_cache=False)
    last: torch.Tensor = output.last_hidden_state
    return last
