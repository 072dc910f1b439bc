"""The verbs of the stages that run in one process: `dskd lexicon`, `dskd student` and `dskd export`."""

import argparse

from dskd.cli.program import add_config_arguments, add_verb
from dskd.config.reading import load_config

_HELP = {
    "lexicon": "read synonyms and antonyms, and write WORKDIR/lexicon/relations.parquet",
    "student": "cut the student from the teacher, or take another model, and write WORKDIR/student",
    "export": "make WORKDIR/export/RUN, a Hugging Face model, from the newest checkpoint of a run",
}
_OVERRIDES_OF_EXAMPLE = {
    "lexicon": "'lexicon.tsv=[pairs.tsv]' lexicon.indirect_antonyms=true",
    "student": "'student.layers=[0, 2, 4]' student.train_layers=1",
    "export": "run=kd",
}


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parser of each stage."""
    for stage, text in _HELP.items():
        examples = (
            f"examples:\n  dskd {stage} --config configs/quickstart.yaml\n"
            f"  dskd {stage} --config FILE {_OVERRIDES_OF_EXAMPLE[stage]}"
        )
        add_config_arguments(add_verb(verbs, stage, run_stage, text=text, epilog=examples))


def run_stage(args: argparse.Namespace) -> None:
    """Builds the artifact of the stage."""
    config = load_config(args.config, args.overrides)
    if args.verb == "lexicon":
        from dskd.lexicon.build import build_lexicon

        build_lexicon(config)
    elif args.verb == "student":
        from dskd.models.students import build_student

        build_student(config)
    else:
        from dskd.training.export import build_export

        build_export(config)
