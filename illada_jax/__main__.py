"""The console command: `illada COMMAND …` is `python -m illada_jax.MODULE …`.

    illada generate --prompt="If the process is not" --watch
    illada train --config=experiments/quickstart.py
    illada help generate

`eval "$(illada --completion)"` enables completion of command names in bash, and in zsh with bashcompinit.
"""

import difflib
import runpy
import sys

import illada_jax
from illada_jax.errors import exit_on_interrupt

# Name of each command → its module and its purpose.
COMMANDS = {
    "train": ("main", "pre-train or fine-tune a model from a config"),
    "generate": ("generate", "continue texts, fill gaps, chat"),
    "evaluate": ("evaluate", "run benchmark tasks with recorded settings"),
    "prepare": ("prepare", "turn text into token shards"),
    "convert": ("convert", "import official weights, export your own, quantise to int8"),
    "aot": ("aot", "compile for TPUs with none attached: memory, traffic, bounds"),
    "plot": ("plot", "plot the metrics of workdirs"),
}


def usage() -> str:
    """The output of `illada --help`."""
    commands = "".join(f"  {name:<10}{purpose}\n" for name, (_, purpose) in COMMANDS.items())
    return f"""usage: illada COMMAND [--option=value …]   (illada COMMAND --help lists the options)

{commands}
examples:
  illada generate --prompt="If the process is not" --watch
  illada generate --chat
  illada train --config=experiments/quickstart.py
  illada help train"""


def main() -> int | None:
    """Runs the command that the first argument names, in this process."""
    exit_on_interrupt()
    if sys.argv[1:2] == ["help"] and len(sys.argv) > 2:
        sys.argv[1:] = [sys.argv[2], "--help"]
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(usage())
        return None
    if sys.argv[1] == "--version":
        print(f"illada_jax {illada_jax.__version__}")
        return None
    if sys.argv[1] == "--completion":
        print(f'complete -o default -W "{" ".join(COMMANDS)}" illada')
        return None
    name = sys.argv.pop(1)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(COMMANDS)}"
        print(f"error: illada {name}: unknown command; {hint}", file=sys.stderr)
        return 2
    runpy.run_module(f"illada_jax.{COMMANDS[name][0]}", run_name="__main__", alter_sys=True)
    return None


if __name__ == "__main__":
    sys.exit(main())
