"""The READMEs: their commands parse, and what they name and link to is there."""

import importlib.util
import re
import shlex
import signal
import sys
import tomllib
from pathlib import Path

import ablation
import pytest

from scalegpt.config import Config, command_line
from scalegpt.config.predecessors import ROWS
from scalegpt.processes.exits import Exit
from scalegpt.run.metrics import EVAL_KEYS, TRAIN_KEYS

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([ROOT / "README.md", *ROOT.glob("[!.]*/README.md"), *ROOT.glob("data/*/README.md")])
TEXTS = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in FILES}
MAIN = TEXTS["README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Files of a run, of a data set and of nanoGPT.
NOT_OURS = {
    "core.yaml",
    *("config.yaml", "manifest.json", "meta.json", "inference.py"),
    *("config/x.py", "config/eval_gpt2.py"),
}


def spans(text: str) -> list[str]:
    """What stands between backticks outside of blocks of code."""
    return re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))


def commands() -> list[str]:
    """Each `python ...` of scalegpt's in a block or between backticks, from its name on.

    Of a synopsis, as `[--tokenizer gpt2|byte] [--workers N]`, all options with their first value.
    """
    found = []
    for text in TEXTS.values():
        blocks = [body for language, body in BLOCK.findall(text) if language != "yaml"]
        lines = re.sub(r"\\\n|\n +(?=\[)", " ", "".join(blocks)).splitlines()
        for line in [*lines, *spans(text)]:
            for part in re.split(r" && |; ", line.split(" #")[0]):
                command = re.search(r"python (-m scalegpt\.\w+|(tools|data)/[\w/]+\.py)\b.*", part)
                if command:
                    found.append(re.sub(r"[\[\]]|\|[\w.|]+", "", command[0]).strip(" '"))
    return list(dict.fromkeys(found))


class Parsed(BaseException):
    """A command's own parser has taken its arguments."""


@pytest.fixture
def only_parse(monkeypatch, tmp_path):
    """Every command raises Parsed instead of going to work; what it may read is there."""
    inside = 0

    def stopping(parse):
        def wrapped(*args, **keywords):
            nonlocal inside
            inside += 1
            try:
                result = parse(*args, **keywords)
            finally:
                inside -= 1
            if inside:
                return result
            raise Parsed

        return wrapped

    parsers = (command_line, "parse"), (command_line.Parser, "parse_args"), (ablation, "parse")
    for owner, name in parsers:
        monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "out" / "char_cpu").mkdir(parents=True)


def load(words: list[str]) -> tuple[str, list[str]]:
    """The module of a command and its arguments, from the words after `python`."""
    if words[0] == "-m":
        name, arguments = words[1], words[2:]
        return importlib.import_module(name), arguments
    script, arguments = Path(words[0]), words[1:]
    if script.parts[0] == "tools":
        return importlib.import_module(script.stem), arguments
    if script.parent.name == "shakespeare_char":  # runs the other
        script = Path("data/shakespeare/prepare.py")
    spec = importlib.util.spec_from_file_location(f"prepare_{script.parent.name}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, arguments


@pytest.mark.parametrize("command", commands())
def test_every_command_parses_with_its_own_parser(only_parse, monkeypatch, command):
    for variable, value in (("SIZE", "16"), (r"\w+", "3")):  # of Open MPI
        command = re.sub(rf"\$OMPI\w+{variable}", value, command)
    words = shlex.split(command)[1:]
    module, arguments = load([re.sub(r"^N$", "2", word) for word in words])
    if not arguments and words[0] != "data":  # the name of a command
        assert callable(module.main)
        return
    monkeypatch.setattr(sys, "argv", [words[0], *arguments])
    with pytest.raises(SystemExit if "--help" in arguments else Parsed):
        module.main(arguments)
    if "--" in arguments:  # tools/tpu.py hands these on
        with pytest.raises(Parsed):
            importlib.import_module("scalegpt.train").main(arguments[arguments.index("--") + 1 :])


def test_commands_are_found_in_blocks_between_backticks_and_in_synopses():
    found = commands()
    assert len(found) > 60
    assert any(command.endswith("--print-config") for command in found)
    assert any("--distributed.process_id=" in command for command in found)
    synopsis = next(command for command in found if "--errors" in command)
    assert "--tokenizer gpt2 --text-key text" in " ".join(synopsis.split())
    assert {command.split()[1] for command in found} >= {
        *(f"tools/{name}.py" for name in ("bench", "sizing", "ablation", "parity", "crash_test")),
        *(f"tools/{name}.py" for name in ("checkpoint", "convert_hf", "lm_eval", "tpu")),
        *(f"data/{path.parent.name}/prepare.py" for path in ROOT.glob("data/*/prepare.py")),
    }


def test_fault_11_the_readme_gives_one_command_that_passes_the_tests():
    """.ci/run takes both commands from here, and adds flags to the first."""
    first = BLOCK.findall(MAIN)[0][1].splitlines()
    assert len(first) == 2
    assert first[0].endswith("python -m scalegpt.train --config configs/demo.yaml")
    assert first[1].endswith("python -m pytest")


def test_the_readme_has_at_most_200_lines():
    assert len(MAIN.splitlines()) <= 200


def test_the_readme_names_every_room_and_each_folders_readme_what_is_in_the_folder():
    for room in ROOT.glob("scalegpt/*/__init__.py"):
        assert f"`{room.parent.name}/`" in MAIN, room
    for command in ("train", "evaluate", "generate"):
        assert f"`{command}.py`" in MAIN
    for tool in ROOT.glob("tools/*.py"):
        assert f"`{tool.name}`" in TEXTS["tools/README.md"], tool
    for config in ROOT.glob("configs/*.yaml"):
        series = config.name.startswith("eval_gpt2_")  # named together
        assert series or f"`{config.name}`" in TEXTS["configs/README.md"], config
    for recipe in ROOT.glob("data/*/prepare.py"):
        assert f"]({recipe.parent.name}/README.md)" in TEXTS["data/README.md"], recipe


@pytest.mark.parametrize("document", TEXTS)
def test_every_file_it_names_exists(document):
    folders = (ROOT, (ROOT / document).parent, ROOT / "scalegpt", ROOT / "tools")
    named = {span for span in spans(TEXTS[document]) if re.fullmatch(r"[\w/.]+\.(py|yaml)", span)}
    ours = r"\b(?:(?:configs|data|tools)/[a-z0-9_/]+\.(?:py|yaml)|configs/[a-z0-9_/]+\.json)\b"
    named |= set(re.findall(ours, TEXTS[document]))
    assert named or document.startswith("data/")
    for file in named - NOT_OURS:
        assert "NAME" in file or any((folder / file).is_file() for folder in folders), file


def test_every_name_in_the_code_that_the_tour_tells_of_is_there():
    """`loop` in `train.py`, `problems` and `read` in `checkpoints/manifest.py`, and the like."""
    text = " ".join(TEXTS["scalegpt/README.md"].split())
    names, file = r"`\w+`(?:(?:, | and | or )`\w+`)*", r"`([a-z_/]+\.py)`"
    places = re.findall(rf"({names}) (?:in|within|of) {file}", text)
    places += [pair[::-1] for pair in re.findall(rf"{file}: ({names})", text)]
    assert len(places) > 15
    for names, file in places:
        folder = ROOT if file.startswith("tests/") else ROOT / "scalegpt"
        code = (folder / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            there = rf"(def|class) {name}\b|^{name}\b.* = |^{name} = "
            assert re.search(there, code, re.MULTILINE), f"{name} in {file}"


def test_every_key_they_name_exists():
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    text = "\n".join(TEXTS.values())
    keys = re.findall(rf"(?<![\w/])(?:--)?({'|'.join(sections)})\.([a-z]\w*)\b(?!\()", text)
    assert len(keys) > 60
    for section, key in keys:
        known = sections[section].model_fields
        assert key in known or key in ("py", "bin", "yaml"), f"{section}.{key}"


def test_the_table_of_other_trainers_names_is_the_one_that_messages_read():
    shown = TEXTS["configs/README.md"].partition("## Coming from nanoGPT")[2]
    assert re.findall(r"^\| (.*) \| (.*) \|$", shown, re.MULTILINE) == [("there", "here"), *ROWS]


def test_the_config_it_shows_is_the_file():
    shown = next(body for language, body in BLOCK.findall(TEXTS["configs/README.md"]) if language)
    assert shown == (ROOT / "configs" / "shakespeare_char_cpu.yaml").read_text(encoding="utf-8")


def test_all_metrics_and_exit_codes_are_explained():
    text = TEXTS["configs/README.md"]
    for key in (*TRAIN_KEYS, *EVAL_KEYS):
        assert f"`{key}`" in text, key
    table = text.split("## When something goes wrong")[1]
    codes = {
        int(code)
        for line in re.findall(r"^\| ([\d, ]+) \|", table, re.M)
        for code in line.split(",")
    }
    assert codes == {*Exit, 1, 128 + signal.SIGTERM}, codes  # 1: Python's own, with a traceback


def test_every_extra_that_they_install_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"(?:scalegpt|\.)\[(\w[\w,]*)\]", "\n".join(TEXTS.values()))
    assert len(named) > 5
    assert {extra for names in named for extra in names.split(",")} <= set(
        project["optional-dependencies"]
    )


@pytest.mark.parametrize("document", TEXTS)
def test_every_relative_link_resolves(document):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXTS[document]):
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in anchors, target
