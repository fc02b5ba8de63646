"""This tool measures a trained model by tasks of EleutherAI's lm-evaluation-harness.

    python tools/lm_eval.py --run out/NAME --tasks hellaswag,arc_easy,piqa [--limit 200]

Tasks, prompts and figures are the harness's own (pip install 'scalegpt[lm-eval]'); log-likelihoods
and texts are ours, on any mesh and without torch. `lm-eval ls tasks` lists what there is. The
harness downloads a task's data from Hugging Face when it is first asked for.
"""

if __name__ == "__main__":
    import sys

    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()
    sys.path.append(sys.path.pop(0))  # the package of this file's name comes before this folder

import argparse
import difflib
import json
import os
from pathlib import Path
from typing import Any

from scalegpt import __version__
from scalegpt.config import command_line
from scalegpt.errors import Mistake
from scalegpt.files.cache import keep_compiled
from scalegpt.files.folder import replace_file
from scalegpt.files.run_folder import first_line
from scalegpt.processes import startup
from scalegpt.processes.command import run_command
from scalegpt.weights import trained


def main(argv: list[str]) -> int:
    flags = parser().parse_args(argv)
    check(flags)
    keep_compiled()
    # The harness would fork for its bootstrap, and JAX's threads do not survive that.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with startup.start(trained.machine(flags).distributed) as group:
        trained.self_check(flags, group)
        manager, loaded = tasks(flags)
        results = evaluate(flags, trained.load(flags, flags.microbatch), manager, loaded)
        if group.index == 0:
            report(flags, results)
        return group.farewell(0)


def parser() -> command_line.Parser:
    whole = command_line.Parser(
        prog="lm_eval.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    trained.add_flags(whole)
    add = whole.add_argument
    add("--tasks", required=True, metavar="A,B", help="names, patterns as mmlu_*, YAML files")
    add("--include-path", metavar="DIR", help="a folder with more tasks as YAML files")
    add("--limit", type=float, help="first so many examples of each task, or below 1 a share")
    add("--num-fewshot", type=int, metavar="K", help="examples in a prompt (default: the task's)")
    add("--gen-kwargs", default="", metavar="K=V,..", help="as max_gen_toks=64,temperature=0.8")
    add("--apply-chat-template", action="store_true", help="ask in a conversation, by our marks")
    add("--system-instruction", metavar="TEXT", help="the conversation's first message")
    add("--seed", type=int, default=1234, help="of few-shot examples and drawn answers (1234)")
    add("--microbatch", type=int, default=8, help="rows that a device works on (default 8)")
    add("--out", metavar="FILE", help="write all results as JSON; the file must not be there yet")
    return whole


def check(flags: argparse.Namespace) -> None:
    """Raise Mistake for what can be told before JAX starts and weights are read."""
    if not 1 <= flags.microbatch <= 1 << 16:
        raise Mistake(f"--microbatch={flags.microbatch} must be from 1 to {1 << 16}")
    if flags.limit is not None and not 0 < flags.limit < 2**53:
        raise Mistake(f"--limit={flags.limit} must be above 0: a number of examples, or a share")
    if flags.num_fewshot is not None and flags.num_fewshot < 0:
        raise Mistake(f"--num-fewshot={flags.num_fewshot} must be at least 0")
    if not 0 <= flags.seed < 2**32:
        raise Mistake(f"--seed={flags.seed} must be from 0 to {2**32 - 1}")
    if flags.include_path is not None and not Path(flags.include_path).is_dir():
        raise Mistake(f"--include-path={flags.include_path}: there is no such folder")
    if flags.out and (Path(flags.out).exists() or not Path(flags.out).resolve().parent.is_dir()):
        raise Mistake(f"--out={flags.out} must be a new file in a folder that is there")


def tasks(flags: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Return the harness's task manager, and the tasks and groups that --tasks names.

    Raises Mistake for a missing package, an unknown task, and one whose data cannot be read.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise Mistake(
            f"this needs the harness: pip install 'scalegpt[lm-eval]' ({first_line(error)})"
        ) from error
    manager, loaded = TaskManager(include_path=flags.include_path), []
    for pattern in dict.fromkeys(filter(None, flags.tasks.split(","))):
        names = [pattern] if Path(pattern).is_file() else manager.match_tasks([pattern])
        if not names:
            near = difflib.get_close_matches(pattern, manager.all_tasks)
            raise Mistake(
                f"the harness has no task {pattern}"
                + (f"; near it are {', '.join(near)}" if near else "")
                + "; `lm-eval ls tasks` lists all, and --include-path adds your own"
            )
        for name in names:
            try:
                found = manager.load([name])
            except Exception as error:  # the Hub, YAML files and tasks' own code raise anything
                # Whatever is not there, online or in the cache, is an OSError.
                hint = (
                    ". Its data come from Hugging Face: without a network copy "
                    "~/.cache/huggingface from a machine that has run it and set "
                    "HF_DATASETS_OFFLINE=1, or give a task over your own files by --include-path"
                )
                raise Mistake(
                    f"the task {name} cannot be loaded: {first_line(error)}"
                    + (hint if isinstance(error, OSError) else "")
                ) from error
            refuse_what_is_not_ours(found["tasks"])
            group = found["groups"].get(name)
            loaded += [group] if group else found["tasks"].values()
    if not loaded:
        raise Mistake(f"--tasks={flags.tasks} names no task")
    return manager, loaded


def refuse_what_is_not_ours(found: dict[str, Any]) -> None:
    for name, task in found.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise Mistake(f"the task {name} runs code that the model writes, which is refused here")
        if getattr(task, "MULTIMODAL", False):
            raise Mistake(f"the task {name} shows pictures, and the model reads text alone")


def evaluate(
    flags: argparse.Namespace, model: trained.Trained, manager: Any, loaded: list[Any]
) -> dict[str, Any]:
    """Return the harness's results, with `scalegpt`: which model was asked, and how."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.utils import simple_parse_args_string
    from lm_evals.language_model import LanguageModel

    lm = LanguageModel(model, flags.seed, flags.apply_chat_template)
    options = simple_parse_args_string(flags.gen_kwargs)
    for task in manager.load(loaded)["tasks"].values():
        if task.OUTPUT_TYPE == "generate_until":  # a mistake in it must not cost the others' hours
            lm.generation({**(task.config.generation_kwargs or {}), **options})
    whole = flags.limit is None or flags.limit < 1
    results = simple_evaluate(
        lm,
        tasks=loaded,
        task_manager=manager,
        num_fewshot=flags.num_fewshot,
        limit=flags.limit if whole else int(flags.limit),
        gen_kwargs=options or None,
        system_instruction=flags.system_instruction,
        apply_chat_template=flags.apply_chat_template,
        log_samples=False,
        torch_random_seed=None,
        fewshot_random_seed=flags.seed,
    )
    asked = {"model": model.name, "step": model.step, "version": __version__}
    asked |= {"dtype": model.config.model.dtype, "block_size": lm.max_length}
    return {"scalegpt": {**asked, "requests": lm.asked, "contexts_cut": lm.cut}, **results}


def report(flags: argparse.Namespace, results: dict[str, Any]) -> None:
    from lm_eval.utils import handle_non_serializable, make_table

    if flags.out:
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        replace_file(flags.out, text.encode())
    asked = results["scalegpt"]
    step = "" if asked["step"] is None else f", step {asked['step']}"
    print(f"{asked['model']}{step}\n{make_table(results)}")
    if "groups" in results:
        print(make_table(results, "groups"))
    if asked["contexts_cut"]:
        print(
            f"{asked['contexts_cut']:,} of {asked['requests']:,} contexts are longer than "
            f"block_size={asked['block_size']}, and lost their beginning"
        )


if __name__ == "__main__":
    run_command(main)
