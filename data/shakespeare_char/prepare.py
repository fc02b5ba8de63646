"""Prepare Tiny Shakespeare as characters, by data/shakespeare/prepare.py --tokenizer char."""

import runpy
import sys
from pathlib import Path

from scalegpt.config.presets import data_folder

if __name__ == "__main__":
    sys.argv[1:1] = ["--tokenizer", "char", "--out", str(data_folder(__file__))]
    script = Path(__file__).resolve().parents[1] / "shakespeare" / "prepare.py"
    runpy.run_path(str(script), run_name="__main__")
