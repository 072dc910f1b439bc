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

    vocab_size: int = Field(4096, ge=300, description="size of the byte-pair encoding that is trained on the corpus")
    num_layers: int = Field(8, ge=2, description="number of decoder layers")
    hidden_size: int = Field(256, ge=16, description="width of the hidden states (D)")
    num_heads: int = Field(4, ge=1, description="number of attention heads; must divide hidden_size")
    train_tokens: int = Field(1_000_000, ge=1000, description="number of tokens to train on")
    batch_size: int = Field(16, ge=1, description="sequences in one optimizer step")
    learning_rate: float = Field(0.02, gt=0, description="learning rate of Muon, for the weight matrices of the layers")
    embedding_learning_rate: float = Field(0.003, gt=0, description="learning rate of AdamW, for all else")

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
    trust_remote_code: bool = Field(False, description="run code that comes with the model: only for one you trust")
    mode: Literal["resident", "zero3", "cached"] = Field(
        "zero3",
        description="resident: every rank holds all of the teacher; zero3: each holds a share of it; cached: training "
        "reads the distributions that annotation stored (annotation.teacher_top_n) and loads no teacher",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "cpu", description="with mode: zero3. Where a rank keeps its share: on the device, in memory, on disk"
    )
    nvme_path: str | None = Field(None, description="with offload: nvme. Node-local folder for the shares")
    train_from_scratch: TeacherRecipe | None = Field(None, description="train a small teacher on the corpus instead")

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
        description="where text comes from. wordnet: glosses and examples; files: your own; huggingface: a dataset "
        "that `datasets` can load; tasks: prompts of the paper's benchmarks (section tasks)",
    )
    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)] = Field(
        TASKS,
        description="with source: tasks. Benchmarks whose training splits become few-shot prompts (docs/method.md, "
        "section 4)",
    )
    train: tuple[str, ...] = Field(
        (),
        description="with source: files. Paths, folders or globs of .txt and .jsonl (also .gz), .parquet, and folders "
        "of MDS shards",
    )
    validation: tuple[str, ...] = Field(
        (), description="with source: files. Held-out files; empty: a share of the training documents"
    )
    dataset: str | None = Field(None, description="with source: huggingface. Its name on the hub, or a folder")
    dataset_config: str | None = Field(None, description="configuration of the dataset, where it has several")
    dataset_revision: str | None = Field(None, description="branch, tag or commit of a dataset on the hub")
    train_split: str = Field("train", min_length=1, description="split of the dataset to train on")
    validation_split: str | None = Field(None, description="held-out split; null: a share of the training documents")
    text_field: str = Field(
        "text", min_length=1, description="key or column that holds the text, where there are several"
    )
    validation_share: float = Field(0.05, gt=0, lt=0.5, description="share of documents held out, chosen by a hash")
    sequence_length: int = Field(128, ge=8, description="number of tokens in a training sequence")
    packing: Literal["documents", "stream", "none"] = Field(
        "documents",
        description="how documents fill sequences. documents: end to end, each by itself (attention and positions "
        "begin again); stream: end to end as one text; none: each document is one sample, padded",
    )
    max_sequences: int | None = Field(None, ge=1, description="number of training sequences at most; null: all")
    max_validation_sequences: int | None = Field(
        None, ge=1, description="number of held-out sequences at most; null: all"
    )

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
    """Where WordNet lies."""

    path: str | None = Field(
        None, description="folder with WordNet's dictionary files (data.noun, index.noun, …); null: search"
    )


Language = Annotated[str, Field(pattern=r"^[a-z]{3}$")]


class LexiconConfig(Section):
    """Where synonyms and antonyms come from (docs/method.md, section 1)."""

    wordnet: bool = Field(True, description="take from WordNet the lemmas of a synset as synonyms, and direct antonyms")
    indirect_antonyms: bool = Field(
        False, description="also indirect antonyms of English adjectives, through adjectives they are similar to"
    )
    languages: Annotated[tuple[Language, ...], Field(min_length=1)] = Field(
        ("eng",),
        description="WordNet's languages, as ISO 639-3 codes; others than eng need Open Multilingual WordNet",
    )
    wiktionary: tuple[str, ...] = Field((), description="files of Wiktextract (kaikki.org), .jsonl or .jsonl.gz")
    wiktionary_language: str = Field(
        "English", min_length=1, description="language of the entries to read, their `lang`"
    )
    dict2vec: tuple[str, ...] = Field((), description="pair lists of Dict2Vec, two synonyms in a line")
    tsv: tuple[str, ...] = Field((), description="your own lists of WORD<TAB>synonym|antonym<TAB>WORD; # is a comment")
    morpholex: str | None = Field(
        None, description="file of MorphoLEX (.xlsx): words with a negating affix count as their base, negated"
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
    """How the sense dictionary is built (docs/method.md, section 2)."""

    path: str | None = Field(
        None, description="folder of a finished dictionary to use instead, such as `dskd senses merge` writes"
    )
    key: Literal["predicted", "target"] = Field(
        "predicted",
        description="token to store a state under: the one the teacher predicts (the paper), or the next",
    )
    k: int = Field(10, ge=1, description="largest number of senses of a token")
    states_per_sense: int | None = Field(
        None, ge=1, description="kept states of a token for each of its senses, up to k senses; null: always k"
    )
    max_states: int = Field(100, ge=1, description="number of states kept for a token, drawn at random")
    batch_size: int = Field(16, ge=1, description="number of sequences in one forward pass of the teacher")
    memory_budget: float = Field(
        4.0, gt=0, description="GB (2^30 bytes) of states that a rank holds in memory; more are written to disk"
    )
    save_minutes: float = Field(
        10.0, ge=0, description="minutes between saved points, from which an interrupted gathering of states goes on"
    )
    keep_states: bool = Field(
        False, description="keep the sampled states on disk; changing k or restarts then needs no teacher"
    )
    restarts: int = Field(1, ge=1, description="number of k-means runs for each token; the best is kept")
    max_iterations: int = Field(50, ge=1, description="largest number of Lloyd iterations in a k-means run")

    @model_validator(mode="after")
    def _more_states_than_senses(self) -> "SensesConfig":
        if self.k > self.max_states:
            raise ValueError(
                f"k {self.k} is more than max_states {self.max_states}: no token keeps so many states; lower k, or "
                "raise max_states"
            )
        return self

    surface_forms: tuple[Literal["capitalized", "sentence_initial"], ...] = Field(
        (),
        description="forms of a word beside ' word' (the paper), where they are one token. capitalized: ' Word'; "
        "sentence_initial: 'Word' at the beginning of a text",
    )


class AnnotationConfig(Section):
    """How the streaming shards are made (docs/method.md, section 3).

    A target token that stands for a sense has rows of the sense dictionary: its own (O_i), those of its synonyms (P_i)
    and those of its antonyms (N_i).
    """

    kappa: int = Field(5, ge=1, description="number of sense rows that a position is pulled to, and pushed from")
    batch_size: int = Field(16, ge=1, description="number of sequences in one forward pass of the teacher")
    shard_size_mb: int = Field(64, ge=1, description="size of a shard in MB before compression")
    memory_budget: float = Field(
        4.0, gt=0, description="GB (2^30 bytes) of sense embeddings a rank holds on its device; others are read"
    )
    own_among_antonyms: bool = Field(
        False,
        description="let the own rows of a target that has antonyms compete for N_i too, as in the paper's published "
        "code: a row can then be pulled and pushed at once",
    )
    teacher_top_n: int = Field(
        0,
        ge=0,
        description="number of most probable next tokens of the teacher stored per position, for teacher.mode: cached; "
        "0: none",
    )
    continuation_tokens: int = Field(
        0,
        ge=0,
        description="with corpus.packing: none. The teacher continues each training text greedily, by 1 to this number "
        "of tokens; text and continuation are the sample (docs/method.md, section 4). 0: none",
    )


Count = Annotated[int, Field(ge=1)]
Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


def _on_or_off(value: object) -> object:
    # on and off without quotes are truth values in YAML
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class StudentConfig(Section):
    """How the student is cut from the teacher, and which of its parameters are trained."""

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
        description="compute frozen lower layers once, in the teacher. auto: where that is exact; on: refuse "
        "to train where it is not; off: never",
    )

    @model_validator(mode="after")
    def _layers_are_there(self) -> "StudentConfig":
        problems = []
        kept = len(self.layers) if isinstance(self.layers, tuple) else self.layers
        if isinstance(self.layers, tuple) and list(self.layers) != (right := sorted(set(self.layers))):
            problems.append(
                f"layers: expected different layers in ascending order, such as {right}, found {[*self.layers]}"
            )
            kept = len(right)
        wanted = self.train_layers
        if isinstance(wanted, int) and wanted > kept:
            problems.append(f"train_layers: at most {kept} can be trained, for `layers` keeps as many, found {wanted}")
        elif isinstance(wanted, tuple) and (missing := sorted({layer for layer in wanted if layer >= kept})):
            problems.append(f"train_layers: the student has layers 0 to {kept - 1}, so there is no {missing}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


_KEYS_OF_SENSE_FORMS = {
    "distance": ("margin", "relative_margin", "synonym_weight", "antonym_weight"),
    "distribution": ("sense_temperature", "sense_distance", "sense_candidates", "sense_random_candidates"),
}


class LossConfig(Section):
    """L = ce_weight·CE + kd_weight·T²·KL + sense_weight·L_sense + hidden_weight·|h-t|²/D (docs/method.md, section 4).

    h and t are the last hidden states of student and teacher, D is their width, T is `temperature`, and KL is the
    divergence that `divergence` names. All but L_sense are means over the positions whose target counts; CE and KL are
    weighted means, Σ w_i x_i / Σ w_i with w_i = `lexical_weight` where the target has a synonym or antonym, else 1.

    L_sense in the form `distance` is the paper's. In the form `distribution` it is the mean, over the positions that
    the paper's form draws, each once, of KL(p_teacher || p_student), where p is the softmax over candidates s of
    -d(h, s) / `sense_temperature` and d is `sense_distance`. The candidates of a position are rows of the dictionary,
    each once: those of its own token (O_i), of its synonyms (P_i) and antonyms (N_i), and random ones, the same at all
    positions of a step.
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
            description="with sense_form: distribution. Which rows are candidates: O_i, P_i, N_i, and random ones",
        )
    )
    sense_random_candidates: int = Field(
        128, ge=1, description="with random in sense_candidates. Rows drawn from the whole dictionary in each step"
    )
    margin: float = Field(1.0, ge=0, description="m: antonym rows s farther than this (|h-s|²/D) are not pushed from")
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
    min_relations: int = Field(25, ge=0, description="number of such positions at least, or all")
    hidden_weight: float = Field(0.0, ge=0, description="weight of the squared distance to the teacher's state")

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
    """Optimizer, batches, checkpoints and loading."""

    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(1e-3, ge=0, description="weight decay of AdamW")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="share of steps that warm up; a cosine to 0 follows")
    epochs: float = Field(2.0, gt=0, description="number of passes over the shards, where `steps` is not given")
    steps: int | None = Field(None, ge=1, description="number of optimizer steps, instead of epochs")
    global_batch_size: int = Field(16, ge=1, description="number of sequences in an optimizer step, over all ranks")
    micro_batch_size: int = Field(
        4, ge=1, description="number of sequences a rank runs at once; others are accumulated"
    )
    gradient_clipping: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: no clipping")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints; one is always written at the end")
    keep_last: int = Field(2, ge=1, description="number of newest checkpoints that are kept")
    keep_every: int | None = Field(None, ge=1, description="checkpoints at multiples of this step are never removed")
    num_workers: int = Field(2, ge=0, description="number of loader processes of each rank")
    shard_cache: str | None = Field(None, description="node-local folder for unpacked shards; null: one in /tmp")
    shard_remote: Annotated[str, AfterValidator(_remote_folder)] | None = Field(
        None,
        description="place to read shards from instead of WORKDIR/shards: a copy of that folder, such as "
        "s3://BUCKET/shards; WORKDIR keeps their manifests",
    )
    loss_chunk_size: int | None = Field(
        None, ge=1, description="positions whose logits exist at one time; null: what fits the device's caches"
    )
    compile_losses: bool = Field(False, description="fuse the losses with torch.compile, which takes a minute to start")
    sense_bank: Literal["host", "device"] = Field(
        "host", description="where sense embeddings lie. host: a batch brings its own; device: every rank holds all"
    )
    activation_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    collective_timeout_s: int = Field(
        1800, ge=10, description="seconds a rank waits in a collective operation before it exits with an error"
    )


class TrackingConfig(Section):
    """What goes to MLflow."""

    enabled: bool = Field(True, description="track runs in MLflow")
    uri: str | None = Field(None, description="tracking URI; null: a sqlite database in the work directory")
    experiment: str = Field("dskd", min_length=1, description="name of the MLflow experiment that the runs belong to")
    parent: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$",
        description="name of the MLflow parent run under which this run is nested; it is created where it is missing",
    )
    log_every: int = Field(1, ge=1, description="number of steps between logged metrics")
    system_metrics: bool = Field(True, description="record the use of processors, memory and GPUs of every node")
    system_metrics_every_s: float = Field(10.0, ge=1, description="seconds between two records of system metrics")
    log_model: bool = Field(False, description="upload exports to their run, for mlflow.transformers.load_model")


class EvaluationConfig(Section):
    """Measures on held-out text, and lexical ones."""

    batch_size: int = Field(16, ge=1, description="number of sequences in one forward pass")
    samples: int = Field(4, ge=0, description="number of held-out texts that every model continues; 0: none")
    sample_tokens: int = Field(24, ge=1, description="number of tokens of each continuation, chosen greedily")
    wic: str | None = Field(
        None,
        description="with --lexical. File NAME.data.txt of Words in Context as published, NAME.gold.txt beside it. Use "
        "one for all runs that are compared: with another, or none, lexical measures are of other data",
    )
    wic_threshold: str | None = Field(
        None, description="with wic. Another such file, of the training split say, on which the threshold is chosen"
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
    """The paper's benchmarks, to evaluate on and to train on (docs/method.md, sections 4 and 5).

    Each is a folder with the benchmark's files, as published or as on the hub, or the name of a dataset of the hub.
    """

    arc_challenge: str = Field("allenai/ai2_arc", min_length=1, description="folder or dataset of ARC-Challenge")
    commonsense_qa: str = Field("tau/commonsense_qa", min_length=1, description="folder or dataset of CommonsenseQA")
    piqa: str = Field("baber/piqa", min_length=1, description="folder or dataset of PIQA")
    mmlu: str = Field("cais/mmlu", min_length=1, description="folder or dataset of MMLU")
    squad_v2: str = Field("rajpurkar/squad_v2", min_length=1, description="folder or dataset of SQuAD v2")
    evaluate: tuple[TaskName, ...] = Field(
        (), description="benchmarks that all models are evaluated on at the end of launcher/pipeline.py"
    )
    choice_shots: int = Field(5, ge=0, description="number of examples in a prompt, in all tasks but squad_v2")
    squad_shots: int = Field(1, ge=0, description="number of examples in a prompt of squad_v2")
    choice_tokens: int = Field(2, ge=1, description="largest number of tokens in an answer, in all tasks but squad_v2")
    squad_tokens: int = Field(10, ge=1, description="largest number of tokens in an answer in squad_v2")
    limit: int | None = Field(
        None, ge=1, description="number of examples, drawn at random, per task (mmlu: per subject); null: all"
    )
    batch_size: int = Field(16, ge=1, description="number of prompts that a rank runs at once")
    train_share: float = Field(
        0.25, gt=0, le=1, description="with corpus.source: tasks. Share of training splits to use, but for squad_v2"
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="seed for drawing few-shot examples, tasks.limit and training splits; separate from `seed`, so "
        "that all runs get the same questions",
    )


class PipelineConfig(Section):
    """How `launcher/pipeline.py` starts the stages that run on several ranks."""

    launcher_args: tuple[str, ...] | None = Field(
        None, description="arguments of `deepspeed`; null: all GPUs of this machine, or two ranks where there is none"
    )


def _not_reserved(name: str) -> str:
    if name in ("teacher", "student"):
        raise ValueError(f"{name!r} is what the evaluation calls another model; choose another name for the run")
    return name


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if again := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ValueError(f"{', '.join(map(str, again))} is there more than once: runs of one seed are the same run")
    return seeds


RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), AfterValidator(_not_reserved)]


class Config(Section):
    """The whole experiment. Paths that are not absolute start at the current directory."""

    workdir: str = Field(min_length=1, description="folder for every artifact of this experiment")
    run: RunName = Field(
        "dskd",
        description="name of the run to train; not given: dskd where `runs` is empty or has it, else the first there",
    )
    runs: dict[RunName, dict[str, Any]] = Field({}, description="runs by name, each with the keys in which it differs")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random choice, except those of tasks.seed")
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], AfterValidator(_each_once)] = Field(
        (), description="train each run with each of these, as RUN-s0, …; what all share is made with the first"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="type to compute in; auto: bf16 where the hardware has it"
    )
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
