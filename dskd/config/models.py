"""The sections `teacher` and `student`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dskd.config.section import PathText, Section


class FromScratchConfig(Section):
    """A small Llama-architecture teacher, trained from scratch on the corpus, for use when no model is available."""

    vocab_size: int = Field(4096, ge=300, description="size of the byte-pair encoding that is trained on the corpus")
    num_layers: int = Field(8, ge=2, description="number of decoder layers")
    hidden_size: int = Field(256, ge=16, description="width of the hidden states (D)")
    num_heads: int = Field(4, ge=1, description="number of attention heads; must divide hidden_size")
    train_tokens: int = Field(1_000_000, ge=1000, description="number of tokens to train on")
    batch_size: int = Field(16, ge=1, description="sequences in one optimizer step")
    learning_rate: float = Field(0.02, gt=0, description="learning rate of Muon, for the weight matrices of the layers")
    embedding_learning_rate: float = Field(0.003, gt=0, description="learning rate of AdamW, for all other parameters")

    def problems(self) -> Iterator[str]:
        """Yields a message if the heads do not divide the width."""
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            yield f"hidden_size {self.hidden_size} must be num_heads ({self.num_heads}) times an even number"


class TeacherConfig(Section):
    """The frozen decoder to distil: either `path` or `train_from_scratch`."""

    path: PathText | None = Field(
        None,
        description="Hugging Face folder or model name of the teacher, or a GGUF file (FILE.gguf), which is first "
        "dequantised",
    )
    tokenizer: PathText | None = Field(
        None, description="with a GGUF file. Folder or model name of a tokenizer to use instead of the file's"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a model on the hub")
    trust_remote_code: bool = Field(
        False, description="run code that comes with the model; only for a model that you trust"
    )
    mode: Literal["auto", "resident", "zero3", "cached"] = Field(
        "auto",
        description="resident: every rank holds all of the teacher; zero3: each holds a share of it. cached: training "
        "loads no teacher, and reads from the shards its states (annotation.store), or else its distributions "
        "(annotation.teacher_top_n). auto: cached if the shards have its states, otherwise zero3",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "cpu",
        description="unless mode is resident. Where a rank keeps its share: on the device, in memory, or on disk",
    )
    nvme_path: PathText | None = Field(None, description="with offload: nvme. Node-local folder for the shares")
    train_from_scratch: FromScratchConfig | None = Field(
        None, description="train a small teacher on the corpus instead"
    )

    @property
    def is_gguf(self) -> bool:
        """Whether `path` is a GGUF file."""
        return self.path is not None and self.path.lower().endswith(".gguf")

    @property
    def is_made(self) -> bool:
        """Whether the pipeline makes the teacher, in the work directory: from scratch, or from a GGUF file."""
        return self.path is None or self.is_gguf

    def problems(self) -> Iterator[str]:
        """Yields messages unless there is one source of the teacher, and keys of offloading that fit together."""
        if (self.path is None) == (self.train_from_scratch is None):
            yield "give either path (a model) or train_from_scratch (a recipe), and not both"
        if self.tokenizer is not None and not self.is_gguf:
            yield "tokenizer needs path: FILE.gguf; any other model brings its own tokenizer, and is used with it"
        if self.revision is not None and self.is_gguf:
            yield "revision is of a model on the hub, and path is a GGUF file; remove it"
        if self.offload == "nvme" and self.nvme_path is None:
            yield "offload: nvme needs nvme_path, a folder on a local disk of each node"
        if self.nvme_path is not None and self.offload != "nvme":
            yield "nvme_path needs offload: nvme"
        if self.offload == "nvme" and self.mode == "resident":
            yield "offload: nvme needs mode: auto or zero3; a resident teacher is on the device"


Count = Annotated[int, Field(ge=1)]
Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


def _on_or_off(value: object) -> object:
    # YAML reads on and off without quotes as true and false.
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class StudentConfig(Section):
    """The layers that the student takes from the teacher, and the parameters that are trained."""

    layers: Count | Layers = Field(16, description="number of the teacher's layers to keep, or a list of their indices")
    spacing: Literal["first", "even"] = Field(
        "first", description="with a number in `layers`. first: the lowest; even: first, last, and evenly between"
    )
    train_layers: Annotated[int, Field(ge=0)] | Layers = Field(
        2, description="number of last layers to train, or a list of layer indices (of the student, from 0)"
    )
    train_embeddings: bool = Field(False, description="train the input embeddings (and a head that is tied to them)")
    train_final_norm: bool = Field(False, description="train the norm before the head")
    train_lm_head: bool = Field(False, description="train the output head")
    shared_trunk: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)] = Field(
        "auto",
        description="compute frozen lower layers once, in the teacher. auto: if that is exact; on: refuse "
        "to train if it is not; off: never",
    )

    def problems(self) -> Iterator[str]:
        """Yields messages about layers that are not in order, and about trained layers that the student lacks."""
        kept = len(self.layers) if isinstance(self.layers, tuple) else self.layers
        if isinstance(self.layers, tuple) and list(self.layers) != (ascending := sorted(set(self.layers))):
            yield f"layers: expected different layers in ascending order, such as {ascending}, found {[*self.layers]}"
            kept = len(ascending)
        trained = self.train_layers
        if isinstance(trained, int) and trained > kept:
            yield f"train_layers: at most {kept} can be trained, because `layers` keeps {kept}; found {trained}"
        elif isinstance(trained, tuple) and (missing := sorted({layer for layer in trained if layer >= kept})):
            yield f"train_layers: the student has layers 0 to {kept - 1}, so there is no {missing}"

    @property
    def why_no_trunk(self) -> str | None:
        """The reason why teacher and student share no lowest layers, as far as these keys say; None if they may."""
        if self.shared_trunk == "off":
            return "student.shared_trunk is off"
        if self.train_embeddings:
            return "the student's embeddings are trained"
        kept = len(self.layers) if isinstance(self.layers, tuple) else self.layers
        if isinstance(self.layers, tuple) and self.layers[:1] != (0,):
            return f"the student's lowest layer is the teacher's layer {self.layers[0]}"
        trains_lowest = 0 in self.train_layers if isinstance(self.train_layers, tuple) else self.train_layers >= kept
        if trains_lowest:
            return "the student's lowest layer is trained"
        return "the student has only one layer" if kept == 1 else None
