"""The verb `dskd config`: explains the keys of a configuration, or checks a file."""

import argparse

from dskd.cli.program import add_config_arguments, add_verb
from dskd.config.messages import describe
from dskd.config.reading import load_config
from dskd.errors import UserError

HELP = "explain every key of a configuration file; with --config, check one and print all of its values"
EPILOG = """
examples:
  dskd config                                                                        every key
  dskd config | grep train                                                           some of them
  dskd config --config configs/quickstart.yaml loss.margin=2                         check a file and an override
  dskd config --config configs/quickstart.yaml --run-names                           the runs that it describes
"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parser of `config`."""
    parser = add_verb(verbs, "config", run_config, text=HELP, epilog=EPILOG)
    add_config_arguments(parser, is_required=False)
    parser.add_argument(
        "--run-names", action="store_true", help="with --config: print the names of its runs, one a line"
    )


def run_config(args: argparse.Namespace) -> None:
    """Prints the explanation of all keys, a configuration, or the names of its runs."""
    if args.config is None:
        if args.overrides or args.run_names:
            raise UserError(f"{args.overrides[0] if args.overrides else '--run-names'} needs --config FILE")
        print(describe())
        return
    config = load_config(args.config, args.overrides)
    if args.run_names:
        print("\n".join(config.run_names))
    else:
        import yaml

        print(yaml.safe_dump(config.as_dict(), sort_keys=False), end="")
