"""The sections `teacher` and `student`."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer

from dskd.config.section import PathText, Section

TRUNK_IS_OFF = "student.shared_trunk is off"


def no_trunk_to_store(reason: str) -> str:
    """Returns the message about `annotation.store` with trunk_states where there is no trunk because of `reason`."""
    return (
        "annotation.store: trunk_states needs layers that teacher and student share, but there are none: "
        f"{reason}; remove trunk_states from annotation.store, or change the section student"
    )


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
    revision: str | None = Field(None, description="branch, tag or commit of a model on the Hub")
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
        description="where a rank keeps its share unless mode is resident. none: on the device; cpu: in host memory; "
        "nvme: on a local disk",
    )
    nvme_path: PathText | None = Field(None, description="with offload: nvme. Node-local folder for the shares")
    train_from_scratch: FromScratchConfig | None = Field(
        None, description="train a small teacher on the corpus instead"
    )

    @property
    def is_gguf(self) -> bool:
        """True if `path` is a GGUF file."""
        return self.path is not None and self.path.lower().endswith(".gguf")

    @property
    def is_made(self) -> bool:
        """True if the pipeline makes the teacher, in the work directory: from scratch, or from a GGUF file."""
        return self.path is None or self.is_gguf

    def problems(self) -> Iterator[str]:
        """Yields messages unless there is one source of the teacher, and keys of offloading that fit together."""
        if (self.path is None) == (self.train_from_scratch is None):
            yield "give either path (a model) or train_from_scratch (a recipe), and not both"
        if self.tokenizer is not None and not self.is_gguf:
            yield "tokenizer needs path: FILE.gguf; any other model brings its own tokenizer, and is used with it"
        if self.revision is not None and self.is_gguf:
            yield "revision names a version on the Hub, but path is a GGUF file; remove revision"
        if self.offload == "nvme" and self.nvme_path is None:
            yield "offload: nvme needs nvme_path, a folder on a local disk of each node"
        if self.nvme_path is not None and self.offload != "nvme":
            yield "nvme_path needs offload: nvme"
        if self.offload == "nvme" and self.mode == "resident":
            yield "offload: nvme needs mode: auto or zero3; a resident teacher is on the device"


Spacing = Literal["first", "even", "ends", "importance"]
Count = Annotated[int, Field(ge=1)]
Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


def _on_or_off(value: object) -> object:
    # YAML reads on and off without quotes as true and false.
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


# Keys of `student` that choose layers of the teacher, and so have no effect on a student that is not cut from it.
_CUTTING = ("layers", "spacing", "importance_samples")


def _is_cut(keys: Mapping[str, Any]) -> bool:
    return keys.get("path") is None and keys.get("from_config") is None


# A model that is not cut from the teacher has no part that is better left as it is, so all of it is trained by default.
def _layers_to_train(keys: dict[str, Any]) -> Any:
    return 2 if _is_cut(keys) else "all"


def _trains_the_rest(keys: dict[str, Any]) -> bool:
    return not _is_cut(keys)


class NewStudentConfig(Section):
    """A student with random weights, drawn with `seed`: a Llama of these sizes with the teacher's tokenizer."""

    layers: Count = Field(description="number of decoder layers")
    hidden_size: Count = Field(description="width of the hidden states")
    heads: Count = Field(description="number of attention heads; hidden_size is an even multiple of it")
    kv_heads: Count | None = Field(
        None, description="number of heads of keys and values; divides heads; null: as many as heads"
    )
    intermediate_size: Count | None = Field(
        None,
        description="inner width of the MLPs; null: 8/3 of hidden_size, rounded down to a multiple of 8, at least 8",
    )
    tie_embeddings: bool = Field(True, description="use the input embeddings as the output matrix")

    def problems(self) -> Iterator[str]:
        """Yields messages about heads that do not divide the width, or other heads."""
        if self.hidden_size % (2 * self.heads):
            yield f"hidden_size {self.hidden_size} must be heads ({self.heads}) times an even number"
        if self.kv_heads is not None and self.heads % self.kv_heads:
            yield f"kv_heads {self.kv_heads} must divide heads ({self.heads})"


class StudentConfig(Section):
    """The student: cut from the teacher (`layers`), another pretrained model (`path`), or new (`from_config`).

    With `path` or `from_config` all parameters are trained by default: `train_layers` is then "all", and the other
    `train_` keys are true.
    """

    path: PathText | None = Field(
        None,
        description="Hugging Face folder or model name of a pretrained student, instead of layers of the teacher; its "
        "tokenizer must be the teacher's",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a student on the Hub")
    from_config: NewStudentConfig | None = Field(
        None, description="start from random weights instead of layers of the teacher"
    )
    layers: Count | Layers = Field(16, description="number of the teacher's layers to keep, or a list of their indices")
    spacing: Spacing = Field(
        "ends",
        description="with a number in `layers`. ends: the lowest, and as many of the last as are trained; first: the "
        "lowest; even: first, last, and evenly between; importance: all but the block of layers that changes the "
        "teacher's states least, measured on text",
    )
    importance_samples: int = Field(
        64, ge=1, description="with spacing: importance. Number of training sequences on which layers are measured"
    )
    train_layers: Literal["all"] | Annotated[int, Field(ge=0)] | Layers = Field(
        default_factory=_layers_to_train,
        description="number of last layers to train, a list of layer indices (of the student, from 0), or all; with "
        "path or from_config the default is all",
    )
    train_embeddings: bool = Field(
        default_factory=_trains_the_rest, description="train the input embeddings (and a head that is tied to them)"
    )
    train_final_norm: bool = Field(default_factory=_trains_the_rest, description="train the norm before the head")
    train_lm_head: bool = Field(default_factory=_trains_the_rest, description="train the output head")
    shared_trunk: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)] = Field(
        "auto",
        description="compute frozen lower layers once, in the teacher. auto: if that is exact; on: refuse "
        "to train if it is not; off: never",
    )

    @property
    def origin(self) -> Literal["cut", "path", "from_config"]:
        """The origin of the student: cut from the teacher, as the model at `path`, or as `from_config` describes it."""
        if self.path is not None:
            return "path"
        return "cut" if self.from_config is None else "from_config"

    @property
    def num_layers(self) -> int:
        """The number of the teacher's layers that a cut student keeps."""
        return len(self.layers) if isinstance(self.layers, tuple) else self.layers

    @model_serializer(mode="wrap")
    def _without_cutting(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Leaves out keys that have no effect, so that a printed configuration can be read again.
        values: dict[str, Any] = serialize(self)
        return values if self.origin == "cut" else {k: v for k, v in values.items() if k not in _CUTTING}

    @property
    def is_measured(self) -> bool:
        """True if the choice of layers depends on measurements of the teacher."""
        return self.spacing == "importance" and not isinstance(self.layers, tuple)

    @property
    def last_layers_are_kept(self) -> bool:
        """True if the teacher's last layers stay whatever else is removed, so that `train_layers` affects the cut."""
        return self.spacing in ("ends", "importance") and not isinstance(self.layers, tuple)

    @property
    def last_layers(self) -> int:
        """The number of the teacher's last layers that stay with `ends` and `importance`.

        It is the number of the student's last layers that are trained: of the trained layers in a list, those that
        follow each other up to the student's last. If its last layer is not trained, or all are, it is 2, or less so
        that a lowest layer is left.
        """
        trained = self.train_layers
        if isinstance(trained, tuple):
            last = self.num_layers - 1
            count = next(count for count in range(len(trained) + 1) if last - count not in trained)
        else:
            count = 0 if trained == "all" else trained
        return count if 0 < count < self.num_layers else min(2, self.num_layers - 1)

    def problems(self) -> Iterator[str]:
        """Yields messages about keys for different students, layers that are not in order, trained layers that are
        repeated or that the student lacks, nothing to train, and keys of another spacing.
        """
        if self.origin == "cut":
            yield from self.keys_without_use("student", "spacing", {("importance",): ("importance_samples",)})
            if self.spacing == "importance" and isinstance(self.layers, tuple):
                yield (
                    f"spacing: importance chooses layers, and `layers` is already a list of them, {[*self.layers]}; "
                    "set layers to their number, or remove spacing and importance_samples"
                )
        yield from self._misplaced_keys()
        if self.train_layers == 0 and not (self.train_embeddings or self.train_final_norm or self.train_lm_head):
            yield "nothing would be trained; set train_layers to 1 or more"
        trained = self.train_layers
        if isinstance(trained, tuple) and len(different := sorted(set(trained))) < len(trained):
            yield f"train_layers: expected different layers, such as {different}, found {[*trained]}"
        if self.origin == "path":  # the number of its layers is not known yet
            return
        kept = self.num_layers if self.from_config is None else self.from_config.layers
        if isinstance(self.layers, tuple) and list(self.layers) != (ascending := sorted(set(self.layers))):
            yield f"layers: expected different layers in ascending order, such as {ascending}, found {[*self.layers]}"
            kept = len(ascending)
        reason = f"`layers` keeps {kept}" if self.origin == "cut" else f"from_config.layers is {kept}"
        if (problem := self.why_not_trained(kept, reason)) is not None:
            yield problem

    def _misplaced_keys(self) -> Iterator[str]:
        """Yields messages about keys that are for another student than the one that the others choose."""
        if self.path is not None and self.from_config is not None:
            yield (
                "path names a pretrained student, and from_config describes a new one; remove student.path or "
                "student.from_config"
            )
        if self.revision is not None and self.path is None:
            yield "revision needs student.path, a model on the Hub; set path, or remove revision"
        if self.origin == "cut":
            return
        cutting = [f"student.{key}" for key in _CUTTING if key in self.model_fields_set]
        what = "names a whole model" if self.origin == "path" else "describes a whole model"
        if cutting:
            yield (
                f"{self.origin} {what}, and {' and '.join(cutting)} would cut one from the teacher; remove "
                f"{' and '.join(cutting)}, or student.{self.origin}"
            )
        if self.shared_trunk == "on":
            yield f"shared_trunk: on needs a student that is cut from the teacher, and {self.origin} {what}; remove one"

    @property
    def why_no_trunk(self) -> str | None:
        """The reason why teacher and student share no lowest layers, as far as these keys say; None if they may."""
        if self.origin != "cut":
            return f"student.{self.origin} is not cut from the teacher"
        lowest = self.layers[0] if isinstance(self.layers, tuple) else 0
        return self.why_no_trunk_above(lowest, self.num_layers, trains_embeddings=self.train_embeddings)

    def why_no_trunk_above(self, lowest: int, count: int, *, trains_embeddings: bool) -> str | None:
        """Returns why a student of `count` layers, cut from the teacher, shares no lowest layers with it; None if it
        does.

        Args:
            lowest: the index of the teacher's layer that is the student's lowest.
            count: the number of the student's layers.
            trains_embeddings: True if its embeddings are trained, perhaps only because they are the output matrix.
        """
        if self.shared_trunk == "off":
            return TRUNK_IS_OFF
        if trains_embeddings:
            return "the student's embeddings are trained"
        if lowest:
            return f"the student's lowest layer is the teacher's layer {lowest}"
        if self.trains(0, count):
            return "the student's lowest layer is trained"
        return "the student has only one layer" if count == 1 else None

    def why_not_trained(self, count: int, reason: str) -> str | None:
        """Returns the message that `train_layers` selects layers which a student of `count` layers lacks; None if it
        has them. `reason` says why there are `count`.
        """
        trained = self.train_layers
        if isinstance(trained, int) and trained > count:
            return f"train_layers: at most {count} can be trained, because {reason}; found {trained}"
        if isinstance(trained, tuple) and (missing := sorted({layer for layer in trained if layer >= count})):
            return f"train_layers: the student has layers 0 to {count - 1}, so there is no {missing}"
        return None

    def trains(self, layer: int, count: int) -> bool:
        """Returns True if `train_layers` selects this layer of a student with `count` layers."""
        if self.train_layers == "all":
            return True
        if isinstance(self.train_layers, tuple):
            return layer in self.train_layers
        return layer >= count - self.train_layers
