"""The verb `dskd student`: makes the student, or shows which layers it could keep."""

import argparse

from dskd.cli.program import add_config_arguments, add_verb
from dskd.config.reading import load_config

HELP = "make the student (cut from the teacher, a copy of another model, or a new one), and write WORKDIR/student"
EXPLAIN_HELP = (
    "only measure the teacher's layers on training sequences, and show which layers each spacing keeps, as a table and "
    "as WORKDIR/plots/layers.png, without making a student"
)
EPILOG = """examples:
  dskd student --config configs/quickstart.yaml
  dskd student --config FILE 'student.layers=[0, 2, 4]' student.train_layers=1
  dskd student --config FILE --explain student.spacing=importance"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parser of `student`."""
    parser = add_verb(verbs, "student", run_student, text=HELP, epilog=EPILOG)
    add_config_arguments(parser)
    parser.add_argument("--explain", action="store_true", help=EXPLAIN_HELP)


def run_student(args: argparse.Namespace) -> None:
    """Makes the student, or explains the choice of its layers."""
    config = load_config(args.config, args.overrides)
    if args.explain:
        from dskd.inspection.layer_choice import explain_layers

        print(explain_layers(config))
        return
    from dskd.students.student import build_student

    build_student(config)
