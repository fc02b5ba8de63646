"""The commands of scalegpt: `python -m scalegpt` lists them, and a wheel's scripts start them."""

import runpy
import sys
from functools import partial

from scalegpt.errors import Mistake
from scalegpt.processes.command import python, run_command

COMMANDS = {
    "train": "train a model, or continue a run",
    "evaluate": "measure its loss over text and its scores in tasks",
    "generate": "write text with a model",
    "chat": "talk with a model that has learned from conversations",
    "report": "show one run, or compare several, on a page",
    "stages": "train a model from text to chat, one run after the other",
    "plan": "say what a run needs of a machine, and what it costs there",
}


def start(name: str) -> None:
    """Do what `python -m scalegpt.NAME` does, with the arguments of this process."""
    runpy.run_module(f"scalegpt.{name}", run_name="__main__", alter_sys=True)


# The scripts scalegpt-train and so on.
train, evaluate, generate, chat, report, stages, plan = (partial(start, name) for name in COMMANDS)


def main(argv: list[str]) -> int:
    if argv and argv[0] not in ("-h", "--help"):
        raise Mistake(f"there is no command {argv[0]}; there are {', '.join(COMMANDS)}")
    print("scalegpt trains GPT models in JAX. Its commands, each with --help:")
    for name, purpose in COMMANDS.items():
        print(f"  {python()} -m scalegpt.{name:<9} {purpose}")
    print(f"To begin: {python()} -m scalegpt.train --config demo")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        start(sys.argv.pop(1))
    run_command(main)
