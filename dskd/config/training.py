"""The sections for training: `loss`, `train`, `tracking`, and `pipeline`, which starts all stages."""

import math
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from dskd.config.loss_terms import Input, Term, minimised_terms
from dskd.config.section import PathText, Section

_KEYS_OF_SENSE_FORMS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("distance",): ("margin", "relative_margin", "synonym_weight", "antonym_weight"),
    ("distribution",): ("sense_temperature", "sense_distance", "sense_candidates", "sense_random_candidates"),
}


class LossConfig(Section):
    """L = ce_weight·CE + kd_weight·T²·KL + sense_weight·L_sense + hidden_weight·|h-t|²/D (docs/method.md, section 4).

    h and t are the last hidden states of student and teacher, D is their width, T is `temperature`, and KL is the
    divergence that `divergence` names. If the student has another width, L_sense and |h-t|²/D have W h instead of h,
    with a trained matrix W, and D is the teacher's. All terms except L_sense are means over the positions with a
    target, or in each step over a random share of these (`position_share`); CE and KL are weighted means,
    Σ w_i x_i / Σ w_i, with w_i = `lexical_weight` if the target has a synonym or antonym, and 1 otherwise.

    L_sense in the form `distance` is the paper's. In the form `distribution` it is the mean of
    KL(p_teacher || p_student) over the positions that the paper's form draws, each counted once. p is the softmax of
    -d(h, s) / `sense_temperature` over the candidates s, with d = `sense_distance`. The candidates of a position are
    different rows of the dictionary: those of its own token (O_i), of its synonyms (P_i) and antonyms (N_i), and random
    ones, which are the same at all positions of a step.
    """

    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy with the actual next token")
    kd_weight: float = Field(0.7, ge=0, description="alpha, weight of the divergence between teacher and student")
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = Field(
        "forward_kl",
        description="forward_kl: KL(teacher || student), as in the paper; reverse_kl: KL(student || teacher); "
        "jensen_shannon: the mean of the KL of each to the mixture of both",
    )
    temperature: float = Field(2.0, gt=0, description="T, temperature of both distributions in that divergence")
    lexical_weight: float = Field(
        1.0,
        gt=0,
        description="weight in CE and KL, which stay means, of positions whose target has a synonym or antonym: a "
        "control for what a sense loss gains",
    )
    position_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the positions with a target, drawn at random in each step, at which CE, KL and the "
        "hidden-state distance are computed; 1: at all, as in the paper",
    )
    sense_weight: float = Field(1.0, ge=0, description="lambda, weight of the sense loss; 0 is plain distillation")
    sense_form: Literal["distance", "distribution"] = Field(
        "distance",
        description="distance: pull and push, as in the paper; distribution: KL(teacher || student) of the softmax of "
        "-distance / sense_temperature over the same candidate rows",
    )
    sense_temperature: float = Field(
        0.1, gt=0, description="with sense_form: distribution. Temperature of its softmax, in units of the distance"
    )
    sense_distance: Literal["squared", "cosine"] = Field(
        "squared",
        description="with sense_form: distribution. Distance of a state h and a row s. squared: |h-s|²/D; cosine: "
        "1 - cos(h, s), which does not depend on lengths",
    )
    sense_candidates: Annotated[tuple[Literal["own", "synonym", "antonym", "random"], ...], Field(min_length=1)] = (
        Field(
            ("own", "synonym", "antonym", "random"),
            description="with sense_form: distribution. The rows that are candidates: O_i, P_i, N_i, and random ones",
        )
    )
    sense_random_candidates: int = Field(
        128, ge=1, description="with random in sense_candidates. Rows drawn from the whole dictionary in each step"
    )
    margin: float = Field(
        1.0, ge=0, description="m: a position is not pushed away from antonym rows s farther than this (|h-s|²/D)"
    )
    relative_margin: float | None = Field(
        None, ge=0, description="instead of margin: a multiple of the teacher's own mean distance to antonym rows"
    )
    synonym_weight: float = Field(
        1.0,
        ge=0,
        description="weight of the pull to synonyms (paper: 1); with 0, and antonym_weight 0, own senses only",
    )
    antonym_weight: float = Field(1.0, ge=0, description="w_n, weight of the push from antonyms")
    relation_share: float = Field(0.4, ge=0, le=1, description="share of positions with relations that a step draws")
    min_relations: int = Field(
        25, ge=0, description="draw at least this many such positions, or all if there are fewer"
    )
    hidden_weight: float = Field(0.0, ge=0, description="weight of the squared distance to the teacher's state")

    def problems(self) -> Iterator[str]:
        """Yields messages about a loss without terms, and about keys without effect."""
        if not any(term.is_weighted(self) for term in minimised_terms()):
            yield "every weight is 0: there is nothing to minimise"
        yield from self.keys_without_use("loss", "sense_form", _KEYS_OF_SENSE_FORMS)
        random = type(self).model_fields["sense_random_candidates"].default
        if self.sense_random_candidates != random and "random" not in self.sense_candidates:
            yield "loss.sense_random_candidates needs random in loss.sense_candidates; add it, or remove the key"
        for key, terms in (
            ("lexical_weight", [term for term in minimised_terms() if "lexical_marks" in term.reads]),
            ("position_share", [term for term in minimised_terms() if term.mean_over == "targets"]),
        ):
            if getattr(self, key) != 1 and not any(term.is_weighted(self) for term in terms):
                weights = ", ".join(f"loss.{term.weight}" for term in terms)
                yield (
                    f"loss.{key} {getattr(self, key):g} applies to the terms with the weights {weights}, which are all "
                    "0; remove it, or set one of them"
                )

    def readers(self, *inputs: Input) -> list[Term]:
        """Returns the terms of this loss that read one of these inputs, in the order of the table."""
        return [term for term in minimised_terms() if not set(inputs).isdisjoint(term.inputs(self))]

    def reads(self, *inputs: Input) -> bool:
        """Returns True if a term of this loss reads one of these inputs."""
        return bool(self.readers(*inputs))

    def keys_that_read(self, *inputs: Input) -> str:
        """Returns the keys due to which terms of this loss read these inputs, with their values, for messages."""
        readers = [(term, next(name for name in inputs if name in term.inputs(self))) for term in self.readers(*inputs)]
        return " and ".join(term.key_that_reads(name, self)[0] for term, name in readers)

    @property
    def compares_states(self) -> bool:
        """True if a term of the loss compares the student's states with the teacher's, or with sense embeddings."""
        return self.reads("teacher_states", "sense_rows")

    @property
    def needs_teacher(self) -> bool:
        """True if a term of the loss reads the teacher's hidden states, or what follows from them."""
        return self.reads("teacher_probabilities", "teacher_states")


def _remote_folder(folder: str) -> str:
    if not re.match(r"[a-z0-9]+://[^/\s]|/", folder):
        raise ValueError(
            f"{folder!r} is not a remote folder; give SCHEME://BUCKET/FOLDER, or a folder that begins with /"
        )
    return folder


class TrainConfig(Section):
    """Optimizer, batches, checkpoints and data loading."""

    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate of AdamW")
    learning_rate_batch_size: int | None = Field(
        None,
        ge=1,
        description="global_batch_size that learning_rate is meant for; with another one the peak is scaled by "
        "learning_rate_rule. null: learning_rate is the peak, whatever the batch",
    )
    learning_rate_rule: Literal["linear", "square_root"] = Field(
        "linear",
        description="with learning_rate_batch_size. How the peak grows with the batch. linear: in proportion, so that "
        "rate × steps of an epoch stays the same; square_root: with its square root, the usual advice for Adam",
    )
    weight_decay: float = Field(1e-3, ge=0, description="weight decay of AdamW")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="share of steps that warm up; a cosine to 0 follows")
    epochs: float = Field(2.0, gt=0, description="number of passes over the shards, if `steps` is not given")
    steps: int | None = Field(None, ge=1, description="number of optimizer steps, instead of epochs")
    global_batch_size: int = Field(16, ge=1, description="number of sequences in an optimizer step, over all ranks")
    micro_batch_size: int = Field(
        4, ge=1, description="number of sequences a rank runs at once; the gradients of the others are accumulated"
    )
    gradient_clipping: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: no clipping")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints; one is always written at the end")
    keep_last: int = Field(2, ge=1, description="number of newest checkpoints that are kept")
    keep_every: int | None = Field(None, ge=1, description="checkpoints at multiples of this step are never removed")
    num_workers: int = Field(2, ge=0, description="number of loader processes of each rank")
    shard_cache: PathText | None = Field(
        None,
        description="node-local folder to unpack shards in, or copy them to. null: one in /tmp, and shards in WORKDIR "
        "that are not packed, such as those with stored states, are read where they are",
    )
    shard_remote: Annotated[PathText, AfterValidator(_remote_folder)] | None = Field(
        None,
        description="folder from which shards are read instead of WORKDIR/shards: a copy of it, such as "
        "s3://BUCKET/shards; WORKDIR keeps their manifests",
    )
    loss_chunk_size: int | None = Field(
        None,
        ge=1,
        description="number of positions whose logits exist at once; null: enough for fast matrix products",
    )
    compile_losses: bool = Field(False, description="fuse the losses with torch.compile, which takes a minute to start")
    sense_bank: Literal["host", "device"] = Field(
        "host",
        description="where sense embeddings are. host: a batch brings those that it needs; device: every rank has all",
    )
    activation_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    collective_timeout_s: int = Field(
        1800, ge=10, description="seconds a rank waits in a collective operation before it exits with an error"
    )

    def problems(self) -> Iterator[str]:
        """Yields a message if there is a rule for the learning rate, but no batch to apply it to."""
        if self.learning_rate_batch_size is None and self.learning_rate_rule != "linear":
            yield (
                f"learning_rate_rule: {self.learning_rate_rule} needs train.learning_rate_batch_size, the batch that "
                "learning_rate is meant for; give it, or remove the rule"
            )

    @property
    def peak_learning_rate(self) -> float:
        """The rate at the end of the warm-up: `learning_rate`, scaled to the batch if it is meant for another one.

        `linear` is the rule of the paper's program (docs/method.md, section 4). `square_root` keeps the noise of Adam's
        steps similar (Malladi et al., arXiv 2205.10287, who also change Adam's other constants).
        """
        if self.learning_rate_batch_size is None:
            return self.learning_rate
        ratio = self.global_batch_size / self.learning_rate_batch_size
        return self.learning_rate * (ratio if self.learning_rate_rule == "linear" else math.sqrt(ratio))


def _without_variables(uri: str) -> str:
    if variable := re.search(r"\$(\w+|\{\w+\})", uri):
        raise ValueError(
            f"{variable[0]} is not expanded here, because the address is kept with every run; write the address itself "
            "(%24 is a dollar sign), and give MLflow credentials in MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    return uri


class TrackingConfig(Section):
    """The data that is logged to MLflow."""

    enabled: bool = Field(True, description="track runs in MLflow")
    uri: Annotated[str, AfterValidator(_without_variables)] | None = Field(
        None, description="tracking URI; null: a sqlite database in the work directory"
    )
    experiment: str = Field("dskd", min_length=1, description="name of the MLflow experiment that the runs belong to")
    parent: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$",
        description="name of the MLflow parent run under which this run is nested; it is created if it is missing",
    )
    log_every: int = Field(1, ge=1, description="number of steps between logged metrics")
    system_metrics: bool = Field(True, description="record the use of processors, memory and GPUs of every node")
    system_metrics_every_s: float = Field(10.0, ge=1, description="seconds between two records of system metrics")
    log_model: bool = Field(False, description="upload exports to their run, for mlflow.transformers.load_model")


class PipelineConfig(Section):
    """Settings with which `launcher/pipeline.py` starts the stages that run on several ranks."""

    launcher_args: tuple[str, ...] | None = Field(
        None, description="arguments of `deepspeed`; null: all GPUs of this machine, or two ranks if it has none"
    )
