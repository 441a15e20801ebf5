"""Command line arguments of a training script, with DeepSpeed's names."""

from argparse import ArgumentParser


def add_config_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add ``--deepspeed``, ``--deepspeed_config PATH``, and their deprecated spellings with "deepscale"; `initialize(args=...)` reads them.

    ``--deepspeed`` is for the script's own use. Twice on one parser is argparse's own error.

    >>> add_config_arguments(ArgumentParser()).parse_args(["--deepspeed_config", "ds.json"]).deepspeed_config
    'ds.json'
    """
    group = parser.add_argument_group("DeepSpeed", "configuration in DeepSpeed's form")
    group.add_argument("--deepspeed", action="store_true", help="a flag for the script itself; nothing here reads it")
    group.add_argument("--deepspeed_config", type=str, default=None, metavar="PATH", help="a configuration: JSON or HJSON")  # fmt: skip
    group.add_argument("--deepscale", action="store_true", help="deprecated: --deepspeed")
    group.add_argument("--deepscale_config", type=str, default=None, metavar="PATH", help="deprecated: --deepspeed_config")  # fmt: skip
    return parser
