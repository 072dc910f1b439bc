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
_EXPLAIN_HELP = (
    "cut nothing; measure the teacher's layers on training sequences, and show which layers each way of cutting keeps, "
    "as a table and as WORKDIR/plots/layers.png"
)


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parser of each stage."""
    for stage, text in _HELP.items():
        examples = (
            f"examples:\n  dskd {stage} --config configs/quickstart.yaml\n"
            f"  dskd {stage} --config FILE {_OVERRIDES_OF_EXAMPLE[stage]}"
        )
        if stage == "student":
            examples += "\n  dskd student --config FILE --explain student.spacing=importance"
        parser = add_verb(verbs, stage, run_stage, text=text, epilog=examples)
        add_config_arguments(parser)
        if stage == "student":
            parser.add_argument("--explain", action="store_true", help=_EXPLAIN_HELP)


def run_stage(args: argparse.Namespace) -> None:
    """Builds the artifact of the stage."""
    config = load_config(args.config, args.overrides)
    if args.verb == "lexicon":
        from dskd.lexicon.build import build_lexicon

        build_lexicon(config)
    elif args.verb == "student":
        if args.explain:
            from dskd.inspection.layer_choice import explain_layers

            print(explain_layers(config))
            return
        from dskd.students.student import build_student
        from dskd.training.layer_importance import measure_importance

        build_student(config, measure_importance)
    else:
        from dskd.training.export import build_export

        build_export(config)
