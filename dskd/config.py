"""The typed, frozen configuration of an experiment: sections, keys, defaults and what they mean.

:mod:`dskd.config_file` reads one from a YAML file. One file can describe several training runs that share everything up
to the shards: `runs` maps a run's name to the keys in which it differs, and `run` says which of them a process trains.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the configuration: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def as_dict(self) -> dict[str, Any]:
        """The section as plain JSON-like data."""
        return self.model_dump(mode="json")


class TeacherRecipe(Section):
    """A small Llama-architecture teacher, trained from scratch on the corpus, for use where no model can be had."""

    vocab_size: int = Field(4096, ge=300, description="tokens of the byte-pair encoding trained on the corpus")
    num_layers: int = Field(8, ge=2, description="decoder layers")
    hidden_size: int = Field(256, ge=16, description="width of the hidden states (D)")
    num_heads: int = Field(4, ge=1, description="attention heads; must divide hidden_size")
    train_tokens: int = Field(1_000_000, ge=1000, description="token budget of the training")
    batch_size: int = Field(16, ge=1, description="sequences a step")
    learning_rate: float = Field(0.02, gt=0, description="Muon's, for the weight matrices of the layers")
    embedding_learning_rate: float = Field(0.003, gt=0, description="AdamW's, for embeddings, head and norms")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "TeacherRecipe":
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be num_heads ({self.num_heads}) times an even number"
            )
        return self


class TeacherConfig(Section):
    """The frozen decoder that is distilled; either `path` or `train_from_scratch`."""

    path: str | None = Field(None, description="Hugging Face folder or model name of the teacher")
    revision: str | None = Field(None, description="branch, tag or commit of a model on the hub")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; off unless you trust it")
    mode: Literal["resident", "zero3", "cached"] = Field(
        "zero3",
        description="resident: every rank holds all of it; zero3: each holds its share; cached: training reads the "
        "distributions that annotation stored (annotation.teacher_top_n) and loads no teacher",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "cpu", description="with mode: zero3. Where a rank keeps its share of the teacher"
    )
    nvme_path: str | None = Field(None, description="with offload: nvme. A node-local folder for the shares")
    train_from_scratch: TeacherRecipe | None = Field(None, description="make a small teacher from the corpus instead")

    @model_validator(mode="after")
    def _one_source(self) -> "TeacherConfig":
        if (self.path is None) == (self.train_from_scratch is None):
            raise ValueError("give either path (a model) or train_from_scratch (a recipe), and not both")
        if self.offload == "nvme" and self.nvme_path is None:
            raise ValueError("offload: nvme needs nvme_path, a folder on a local disk of each node")
        if self.nvme_path is not None and self.offload != "nvme":
            raise ValueError("nvme_path needs offload: nvme")
        if self.offload == "nvme" and self.mode == "resident":
            raise ValueError("offload: nvme needs mode: zero3; a resident teacher lies on the device")
        return self


TaskName = Literal["arc_challenge", "commonsense_qa", "piqa", "mmlu", "squad_v2"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)

_KEYS_OF_SOURCES = {
    "files": ("train", "validation"),
    "huggingface": ("dataset", "dataset_config", "dataset_revision", "train_split", "validation_split"),
    "tasks": ("tasks",),
}


class CorpusConfig(Section):
    """The text that senses are gathered from and students are trained on."""

    source: Literal["wordnet", "files", "huggingface", "tasks"] = Field(
        "wordnet",
        description="WordNet's glosses and examples, own files, a dataset that `datasets` can load, or prompts of the "
        "paper's benchmarks (section tasks)",
    )
    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)] = Field(
        TASKS, description="with source: tasks. Whose training splits become few-shot prompts (method, section 4)"
    )
    train: tuple[str, ...] = Field(
        (),
        description="with source: files. Paths, folders or globs of .txt and .jsonl (also .gz), .parquet, and folders "
        "of MDS shards",
    )
    validation: tuple[str, ...] = Field((), description="held-out files; empty: a share of the training documents")
    dataset: str | None = Field(None, description="with source: huggingface. Name on the hub, or a folder")
    dataset_config: str | None = Field(None, description="configuration of the dataset, where it has several")
    dataset_revision: str | None = Field(None, description="branch, tag or commit of a dataset on the hub")
    train_split: str = Field("train", min_length=1, description="split of the dataset to train on")
    validation_split: str | None = Field(None, description="held-out split; null: a share of the training documents")
    text_field: str = Field("text", min_length=1, description="key or column of the text, where it has a name")
    validation_share: float = Field(0.05, gt=0, lt=0.5, description="documents held out, by hash of their identity")
    sequence_length: int = Field(128, ge=8, description="tokens a training sequence (T)")
    packing: Literal["documents", "stream", "none"] = Field(
        "documents",
        description="how documents fill sequences. documents: end to end, each by itself (attention and positions "
        "begin anew); stream: end to end as one text; none: one sample a document, padded",
    )
    max_sequences: int | None = Field(None, ge=1, description="stop after so many training sequences")
    max_validation_sequences: int | None = Field(None, ge=1, description="stop after so many held-out sequences")

    @model_validator(mode="after")
    def _keys_fit_the_source(self) -> "CorpusConfig":
        problems = []
        if self.source == "files" and not self.train:
            problems.append("source: files needs corpus.train, a list of paths or globs")
        if self.source == "huggingface" and not self.dataset:
            problems.append("source: huggingface needs corpus.dataset, a name on the hub or a folder")
        for source, keys in _KEYS_OF_SOURCES.items():
            fields = type(self).model_fields
            wrong = [f"corpus.{key}" for key in keys if getattr(self, key) != fields[key].default]
            if self.source != source and wrong:
                verb = "needs" if len(wrong) == 1 else "need"
                problems.append(f"{' and '.join(wrong)} {verb} source: {source}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class WordNetConfig(Section):
    """Where WordNet is, when it should not be looked for."""

    path: str | None = Field(None, description="folder with WordNet's dictionary files (data.noun, index.noun, …)")


Language = Annotated[str, Field(pattern=r"^[a-z]{3}$")]


class LexiconConfig(Section):
    """Synonyms and antonyms (method, section 1)."""

    wordnet: bool = Field(True, description="lemma synonyms within a synset, and direct antonyms")
    indirect_antonyms: bool = Field(
        False, description="of English adjectives, through the adjectives they are similar to"
    )
    languages: Annotated[tuple[Language, ...], Field(min_length=1)] = Field(
        ("eng",), description="WordNet's, as ISO 639-3 codes; others than eng need Open Multilingual WordNet"
    )
    wiktionary: tuple[str, ...] = Field((), description="files of Wiktextract (kaikki.org): .jsonl or .jsonl.gz")
    wiktionary_language: str = Field("English", min_length=1, description="which entries of them, by their `lang`")
    dict2vec: tuple[str, ...] = Field((), description="Dict2Vec's pair lists: two synonyms a line")
    tsv: tuple[str, ...] = Field((), description="own lists: head<TAB>synonym|antonym<TAB>tail; # begins a comment")
    morpholex: str | None = Field(
        None, description="MorphoLEX (.xlsx): words with a negating affix count as their base, negated"
    )

    @model_validator(mode="after")
    def _some_source(self) -> "LexiconConfig":
        if not (self.wordnet or self.wiktionary or self.dict2vec or self.tsv):
            raise ValueError(
                "no source of relations: set wordnet: true, or wiktionary, dict2vec or tsv to a list of files"
            )
        if not self.wordnet and self.languages != ("eng",):
            raise ValueError("languages are WordNet's: set wordnet: true, or remove them")
        if self.indirect_antonyms and not (self.wordnet and "eng" in self.languages):
            raise ValueError("indirect_antonyms are WordNet's, in English: set wordnet: true and have eng in languages")
        return self


class SensesConfig(Section):
    """The sense dictionary (method, section 2)."""

    path: str | None = Field(
        None, description="a finished dictionary to use instead of building one, such as `dskd senses merge` writes"
    )
    key: Literal["predicted", "target"] = Field(
        "predicted", description="file a state under the token the teacher predicts (the paper), or the actual next one"
    )
    k: int = Field(10, ge=1, description="senses a token at most")
    states_per_sense: int | None = Field(
        None,
        ge=1,
        description="one sense for so many kept states of a token, up to k; default: always k",
    )
    max_states: int = Field(100, ge=1, description="states kept a token, drawn at random")
    batch_size: int = Field(16, ge=1, description="sequences in one forward pass of the teacher")
    memory_budget: float = Field(
        4.0, gt=0, description="GB (2^30 bytes) of states a rank holds in memory; beyond them they are spilled to disk"
    )
    save_minutes: float = Field(10.0, ge=0, description="minutes between points an interrupted gathering goes on from")
    keep_states: bool = Field(
        False, description="keep the sampled states on disk: another k or restarts then need no teacher"
    )
    restarts: int = Field(1, ge=1, description="k-means runs a token; the best is kept")
    max_iterations: int = Field(50, ge=1, description="Lloyd iterations a k-means run at most")

    @model_validator(mode="after")
    def _more_states_than_senses(self) -> "SensesConfig":
        if self.k > self.max_states:
            raise ValueError(
                f"k {self.k} is more than max_states {self.max_states}: no token keeps so many states; lower k, or "
                "raise max_states"
            )
        return self

    surface_forms: tuple[Literal["capitalized", "sentence_initial"], ...] = Field(
        (), description="beside ' word' (the paper) also ' Word', and 'Word' at the beginning of a text, if one token"
    )


class AnnotationConfig(Section):
    """The streaming shards (method, section 3)."""

    kappa: int = Field(5, ge=1, description="rows of the sense dictionary a position is pulled to, or pushed from")
    batch_size: int = Field(16, ge=1, description="sequences in one forward pass of the teacher")
    shard_size_mb: int = Field(64, ge=1, description="size of a shard before compression")
    memory_budget: float = Field(
        4.0, gt=0, description="GB (2^30 bytes) of sense embeddings a rank holds on its device; the others are read"
    )
    own_among_antonyms: bool = Field(
        False,
        description="the rows of a target that has antonyms compete for N_i too, as in the paper's published code: a "
        "row can then be pulled and pushed at once",
    )
    teacher_top_n: int = Field(
        0,
        ge=0,
        description="store the teacher's so many most probable next tokens at every position, for teacher.mode: "
        "cached; 0 stores none",
    )
    continuation_tokens: int = Field(
        0,
        ge=0,
        description="with corpus.packing: none. The teacher goes on with each training text by 1 to so many tokens, "
        "greedily; the text with them is the sample (method, section 4)",
    )


Count = Annotated[int, Field(ge=1)]
Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


def _on_or_off(value: object) -> object:
    # on and off without quotes are truth values in YAML
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class StudentConfig(Section):
    """How the student is cut from the teacher, and which of its parameters are trained."""

    layers: Count | Layers = Field(16, description="how many of the teacher's layers to keep, or their indices")
    spacing: Literal["first", "even"] = Field("first", description="which layers, when `layers` is a number")
    train_layers: Annotated[int, Field(ge=0)] | Layers = Field(
        2, description="train the last so many layers, or these indices"
    )
    train_embeddings: bool = Field(False, description="train the input embeddings (and a head that is tied to them)")
    train_final_norm: bool = Field(False, description="train the norm before the head")
    train_lm_head: bool = Field(False, description="train the output head")
    shared_trunk: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)] = Field(
        "auto",
        description="compute the frozen lower layers once, in the teacher. auto: where that is exact; on: refuse to "
        "train where it is not",
    )


_KEYS_OF_SENSE_FORMS = {
    "distance": ("margin", "relative_margin", "synonym_weight", "antonym_weight"),
    "distribution": ("sense_temperature", "sense_distance", "sense_candidates", "sense_random_candidates"),
}


class LossConfig(Section):
    """L = ce_weight·CE + kd_weight·T²·KL + sense_weight·L_sense + hidden_weight·|h-t|²/D (method, section 4).

    KL stands for the divergence that `divergence` names. All but L_sense are means over the positions whose target
    counts; CE and KL are weighted ones, Σ w_i x_i / Σ w_i with w_i = `lexical_weight` where the target has a synonym or
    antonym and 1 elsewhere.

    L_sense in the form `distance` is the paper's. In the form `distribution` it is the mean, over the positions that
    the paper's form draws, each once, of KL(p_teacher || p_student), where p is the softmax over candidates s of
    -D(h, s) / `sense_temperature`. The candidates of a position are rows of the dictionary, each once: its own (O_i),
    its synonyms' (P_i) and antonyms' (N_i), and random ones, the same at all positions of a step.
    """

    ce_weight: float = Field(1.0, ge=0, description="cross-entropy with the actual next token")
    kd_weight: float = Field(0.7, ge=0, description="alpha: the divergence of teacher and student")
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = Field(
        "forward_kl",
        description="forward_kl: KL(teacher || student), the paper's; reverse_kl: KL(student || teacher); "
        "jensen_shannon: the mean of both's KL to their mixture",
    )
    temperature: float = Field(2.0, gt=0, description="T, of both distributions in that divergence")
    lexical_weight: float = Field(
        1.0,
        gt=0,
        description="how much positions whose target has a synonym or antonym count in CE and KL, which stay means: a "
        "control for what a sense loss gains",
    )
    sense_weight: float = Field(1.0, ge=0, description="lambda: the sense loss; 0 is plain distillation")
    sense_form: Literal["distance", "distribution"] = Field(
        "distance",
        description="distance: the paper's pull and push; distribution: KL(teacher || student) between their softmax "
        "of -distance / sense_temperature over the same candidate rows",
    )
    sense_temperature: float = Field(0.1, gt=0, description="with sense_form: distribution. In units of the distance")
    sense_distance: Literal["squared", "cosine"] = Field(
        "squared",
        description="with sense_form: distribution. squared: |h-s|²/D; cosine: 1 - cos(h, s), which no state's length "
        "changes",
    )
    sense_candidates: Annotated[tuple[Literal["own", "synonym", "antonym", "random"], ...], Field(min_length=1)] = (
        Field(
            ("own", "synonym", "antonym", "random"),
            description="with sense_form: distribution. Which rows take part: O_i, P_i, N_i, and random ones",
        )
    )
    sense_random_candidates: int = Field(
        128, ge=1, description="with random in sense_candidates. Rows drawn each step from the whole dictionary"
    )
    margin: float = Field(1.0, ge=0, description="m: antonym rows farther than this (|h-s|²/D) are left alone")
    relative_margin: float | None = Field(
        None, ge=0, description="instead of margin: so many times the teacher's own mean distance to antonym rows"
    )
    synonym_weight: float = Field(
        1.0, ge=0, description="the pull to synonyms; the paper's is 1. With 0, and antonym_weight 0, own senses only"
    )
    antonym_weight: float = Field(1.0, ge=0, description="w_n: the push from antonyms beside the pull to synonyms")
    relation_share: float = Field(0.4, ge=0, le=1, description="share of a sequence's lexical positions in each step")
    min_relations: int = Field(25, ge=0, description="but at least so many of them, or all")
    hidden_weight: float = Field(0.0, ge=0, description="mean squared distance to the teacher's state: an ablation")

    @model_validator(mode="after")
    def _something_to_minimise(self) -> "LossConfig":
        if not any((self.ce_weight, self.kd_weight, self.sense_weight, self.hidden_weight)):
            raise ValueError("every weight is 0: there is nothing to minimise")
        return self

    @model_validator(mode="after")
    def _keys_have_a_use(self) -> "LossConfig":
        problems = []
        for form, keys in _KEYS_OF_SENSE_FORMS.items():
            fields = type(self).model_fields
            wrong = [f"loss.{key}" for key in keys if getattr(self, key) != fields[key].default]
            if self.sense_form != form and wrong:
                one = len(wrong) == 1
                problems.append(
                    f"{' and '.join(wrong)} {'needs' if one else 'need'} sense_form: {form}, and it is "
                    f"{self.sense_form}; leave {'it at its default' if one else 'them at their defaults'}, or change it"
                )
        random = type(self).model_fields["sense_random_candidates"].default
        if self.sense_random_candidates != random and "random" not in self.sense_candidates:
            problems.append(
                "loss.sense_random_candidates needs random in loss.sense_candidates; add it, or remove the key"
            )
        if self.lexical_weight != 1 and not (self.ce_weight or self.kd_weight):
            problems.append("loss.lexical_weight is of CE and KL, whose weights are 0; remove it, or set one of them")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def compares_sense_distributions(self) -> bool:
        """True when there is a sense loss in the form that reads the teacher's hidden states."""
        return self.sense_weight > 0 and self.sense_form == "distribution"

    @property
    def needs_teacher(self) -> bool:
        """True when a term of the loss reads the teacher's hidden states."""
        return self.kd_weight > 0 or self.hidden_weight > 0 or self.compares_sense_distributions


def _remote_folder(place: str) -> str:
    if not re.match(r"[a-z0-9]+://[^/\s]|/", place):
        raise ValueError(f"{place!r} is no remote folder; give SCHEME://BUCKET/FOLDER, or a folder that begins with /")
    return place


class TrainConfig(Section):
    """Optimisation and checkpoints."""

    learning_rate: float = Field(5e-5, gt=0, description="AdamW's peak")
    weight_decay: float = Field(1e-3, ge=0, description="AdamW's")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="share of the steps that warm up; then a cosine to 0")
    epochs: float = Field(2.0, gt=0, description="passes over the shards, when `steps` is not given")
    steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    global_batch_size: int = Field(16, ge=1, description="sequences an optimizer step, over all ranks")
    micro_batch_size: int = Field(4, ge=1, description="sequences a rank runs at once; the rest is accumulated")
    gradient_clipping: float = Field(1.0, ge=0, description="largest gradient norm; 0 does not clip")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints; one is always written at the end")
    keep_last: int = Field(2, ge=1, description="newest checkpoints that are kept")
    keep_every: int | None = Field(None, ge=1, description="checkpoints of multiples of it are kept for good")
    num_workers: int = Field(2, ge=0, description="loader processes a rank")
    shard_cache: str | None = Field(
        None, description="node-local folder for unpacked shards; default: a private one in /tmp"
    )
    shard_remote: Annotated[str, AfterValidator(_remote_folder)] | None = Field(
        None,
        description="where shards are read from instead of WORKDIR/shards: a copy of it, such as s3://BUCKET/shards; "
        "WORKDIR keeps their manifests",
    )
    loss_chunk_size: int | None = Field(
        None, ge=1, description="positions whose logits exist at one time; default: as many as fit the device's caches"
    )
    compile_losses: bool = Field(False, description="fuse the losses with torch.compile, which takes a minute to start")
    sense_bank: Literal["host", "device"] = Field(
        "host",
        description="host: a batch brings the sense embeddings it needs; device: every rank holds all of them",
    )
    activation_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    collective_timeout_s: int = Field(1800, ge=10, description="a rank that waits longer gives up, non-zero")


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = Field(True, description="track runs at all")
    uri: str | None = Field(None, description="tracking URI; by default sqlite in the work directory")
    experiment: str = Field("dskd", min_length=1, description="experiment that the runs belong to")
    parent: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$",
        description="name of a run of the experiment that this one is shown below, such as a sweep's; made if missing",
    )
    log_every: int = Field(1, ge=1, description="steps between logged metrics")
    system_metrics: bool = Field(True, description="record the use of processors, memory and GPUs of every node")
    system_metrics_every_s: float = Field(10.0, ge=1, description="seconds between two of these samples")
    log_model: bool = Field(
        False, description="export also uploads the model to its run, for mlflow.transformers.load_model"
    )


class EvaluationConfig(Section):
    """Measures on held-out text."""

    batch_size: int = Field(16, ge=1, description="sequences in one forward pass")
    samples: int = Field(4, ge=0, description="held-out texts that every model goes on with; 0 is none")
    sample_tokens: int = Field(24, ge=1, description="tokens by which it goes on, greedily")
    wic: str | None = Field(
        None,
        description="with --lexical. A NAME.data.txt of Words in Context as published, its NAME.gold.txt beside it. "
        "One for all runs that are compared: with another, or none, lexical measures are of other data and made anew",
    )
    wic_threshold: str | None = Field(
        None, description="with wic. Another such file, such as that of its training split, to choose the threshold on"
    )

    @model_validator(mode="after")
    def _threshold_needs_pairs(self) -> "EvaluationConfig":
        if self.wic_threshold is not None and self.wic is None:
            raise ValueError("wic_threshold needs evaluation.wic, the pairs that the threshold is for; give it, too")
        if self.wic is not None and self.wic_threshold is not None:
            place, other = (Path(given).expanduser().resolve() for given in (self.wic, self.wic_threshold))
            if place == other:
                raise ValueError(
                    f"wic_threshold is evaluation.wic itself, {place}, and the threshold would be chosen on what is "
                    "measured; name another file, such as that of the training split, or leave it out"
                )
        return self


class TasksConfig(Section):
    """The paper's benchmarks, to evaluate on and to train on (method, sections 4 and 5).

    Each is a folder with the benchmark's files, as published or as on the hub, or the name of a dataset of the hub.
    """

    arc_challenge: str = Field("allenai/ai2_arc", min_length=1, description="folder or dataset of ARC-Challenge")
    commonsense_qa: str = Field("tau/commonsense_qa", min_length=1, description="folder or dataset of CommonsenseQA")
    piqa: str = Field("baber/piqa", min_length=1, description="folder or dataset of PIQA")
    mmlu: str = Field("cais/mmlu", min_length=1, description="folder or dataset of MMLU")
    squad_v2: str = Field("rajpurkar/squad_v2", min_length=1, description="folder or dataset of SQuAD v2")
    evaluate: tuple[TaskName, ...] = Field(
        (), description="benchmarks that launcher/pipeline.py asks all models at its end, as evaluate.py --tasks does"
    )
    choice_shots: int = Field(5, ge=0, description="examples in a prompt, of all tasks but squad_v2")
    squad_shots: int = Field(1, ge=0, description="examples in a prompt of squad_v2")
    choice_tokens: int = Field(2, ge=1, description="tokens a model may answer with, in all tasks but squad_v2")
    squad_tokens: int = Field(10, ge=1, description="tokens a model may answer with in squad_v2")
    limit: int | None = Field(
        None, ge=1, description="evaluate on so many examples a task, of mmlu a subject, drawn at random; default: all"
    )
    batch_size: int = Field(16, ge=1, description="prompts that a rank runs at once")
    train_share: float = Field(
        0.25,
        gt=0,
        le=1,
        description="with corpus.source: tasks. Share of the training splits, of all tasks but squad_v2",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="of the prompts' examples and of every other choice; not that of the run, since all are asked the "
        "same",
    )


class PipelineConfig(Section):
    """How `launcher/pipeline.py` starts the stages that run on several ranks."""

    launcher_args: tuple[str, ...] | None = Field(
        None, description="arguments of `deepspeed`; by default all GPUs, or two ranks where there is none"
    )


def _not_reserved(name: str) -> str:
    if name in ("teacher", "student"):
        raise ValueError(f"{name!r} is what the evaluation calls another model; choose another name for the run")
    return name


RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), AfterValidator(_not_reserved)]


class Config(Section):
    """The whole experiment. Paths that are not absolute start at the current directory."""

    workdir: str = Field(min_length=1, description="folder for every artifact of this experiment")
    run: RunName = Field("dskd", description="the training run: a key of `runs`")
    runs: dict[RunName, dict[str, Any]] = Field({}, description="named runs, each with the keys in which it differs")
    seed: int = Field(0, ge=0, lt=2**63, description="of every random choice")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(
        (), description="train each run once with each of these, as RUN-s0, …; the first is also that of what all share"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 where the hardware has it")
    teacher: TeacherConfig
    corpus: CorpusConfig = CorpusConfig()  # type: ignore[call-arg]
    wordnet: WordNetConfig = WordNetConfig()  # type: ignore[call-arg]
    lexicon: LexiconConfig = LexiconConfig()  # type: ignore[call-arg]
    senses: SensesConfig = SensesConfig()  # type: ignore[call-arg]
    annotation: AnnotationConfig = AnnotationConfig()  # type: ignore[call-arg]
    student: StudentConfig = StudentConfig()  # type: ignore[call-arg]
    loss: LossConfig = LossConfig()  # type: ignore[call-arg]
    train: TrainConfig = TrainConfig()  # type: ignore[call-arg]
    tracking: TrackingConfig = TrackingConfig()  # type: ignore[call-arg]
    evaluation: EvaluationConfig = EvaluationConfig()  # type: ignore[call-arg]
    tasks: TasksConfig = TasksConfig()  # type: ignore[call-arg]
    pipeline: PipelineConfig = PipelineConfig()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _sections_fit_together(self) -> "Config":
        problems = []
        if self.teacher.mode == "cached":
            if self.loss.kd_weight and not self.annotation.teacher_top_n:
                problems.append(
                    "teacher.mode: cached needs annotation.teacher_top_n, how many tokens are stored (64, say)"
                )
            if self.loss.hidden_weight:
                problems.append(
                    "loss.hidden_weight needs the teacher's states, which teacher.mode: cached has not: set it to "
                    "0, or teacher.mode to resident or zero3"
                )
            if self.loss.compares_sense_distributions:
                problems.append(
                    "loss.sense_form: distribution needs the teacher's states, which teacher.mode: cached has not: set "
                    "it to distance, or teacher.mode to resident or zero3"
                )
            if self.student.shared_trunk == "on":
                problems.append(
                    "student.shared_trunk: on needs a teacher in training, and teacher.mode: cached has none"
                )
        if self.annotation.continuation_tokens and self.corpus.packing != "none":
            problems.append(
                "annotation.continuation_tokens needs corpus.packing: none, where each text has a sample of its own"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def run_names(self) -> tuple[str, ...]:
        """The runs this file describes, in its order."""
        return tuple(self.runs) or (self.run,)

    @property
    def needs_teacher(self) -> bool:
        """True when training runs the teacher."""
        return self.loss.needs_teacher and self.teacher.mode != "cached"

    def path(self, *parts: str) -> Path:
        """A path inside the work directory."""
        return Path(self.workdir).expanduser().joinpath(*parts)
