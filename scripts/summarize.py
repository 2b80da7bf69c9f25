"""Print one table of finished runs.

python scripts/summarize.py outputs/quickstart/teacher outputs/quickstart/kd
"""

import argparse
from pathlib import Path

from hf_ihb.run import run_script
from hf_ihb.runs.report import results_table


def main(argv: list[str]) -> None:
    """Run folders -> table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="Folder of a finished run.")
    print(results_table(parser.parse_args(argv).folders))


if __name__ == "__main__":
    run_script(main)
