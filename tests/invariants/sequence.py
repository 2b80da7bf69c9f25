"""Distils once for each recipe named on the command line, in one process: imports take longer than a few steps."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import distill

from hf_ihb.run import run_script


def main(argv: list[str]) -> None:
    folder, *recipes = argv
    for recipe in recipes:
        distill.main([recipe, "--output_dir", str(Path(folder) / Path(recipe).stem)])


if __name__ == "__main__":
    run_script(main)
