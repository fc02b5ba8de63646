"""Tiny Shakespeare as characters: data/shakespeare/prepare.py --tokenizer char, written here."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.argv[1:1] = ["--tokenizer", "char", "--out", str(here)]
    runpy.run_path(str(here.parent / "shakespeare" / "prepare.py"), run_name="__main__")
