"""The README: its two commands, its tour and the keys and files it names are really there."""

import re
from pathlib import Path

from scalegpt.config import Config

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_fault_11_the_readme_gives_one_command_that_passes_the_tests():
    first = BLOCKS[0][1].splitlines()
    assert len(first) == 2
    assert "python -m scalegpt.train --config configs/demo.yaml" in first[0]
    assert first[1].endswith("python -m pytest")


def test_the_tour_names_at_most_seven_files_and_they_exist():
    tour = TEXT.split("## Guided tour")[1].split("\n\n")[2]
    files = re.findall(r"\]\((\S+)\)", tour)
    assert 0 < len(files) <= 7
    for file in files:
        assert (ROOT / file).is_file(), file


def test_every_file_it_names_exists():
    named = set(re.findall(r"\b(?:configs|data|scalegpt|tools)/[\w/]+\.(?:yaml|py)\b", TEXT))
    assert len(named) > 10
    for file in named:
        assert (ROOT / file).is_file(), file


def test_every_key_it_names_exists():
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    keys = re.findall(rf"\b({'|'.join(sections)})\.([a-z]\w*)", TEXT)
    assert len(keys) > 20
    for section, key in keys:
        known = sections[section].model_fields
        assert key in known or key in ("py", "bin"), f"{section}.{key}"


def test_the_config_it_shows_is_the_file():
    shown = next(body for language, body in BLOCKS if language == "yaml")
    assert shown == (ROOT / "configs" / "shakespeare_char_cpu.yaml").read_text(encoding="utf-8")
