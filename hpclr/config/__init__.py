"""The run file: a typed schema, YAML 1.2, overrides, errors that say where and what to write instead."""

from hpclr.config.compare import differences
from hpclr.config.load import dump, load_run_file, parse_run_file
from hpclr.config.schema import RunFile

__all__ = ["RunFile", "differences", "dump", "load_run_file", "parse_run_file"]
