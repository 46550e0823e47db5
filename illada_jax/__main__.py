"""The console command: `illada COMMAND …` is `python -m illada_jax.MODULE …`.

    illada generate --prompt="The with statement" --watch
    illada train --config=experiments/quickstart.py
    illada help generate

`eval "$(illada --completion)"` makes bash, and zsh with bashcompinit, complete the names of the commands.
"""

import difflib
import runpy
import sys

import illada_jax

# What is typed → the module that does it, and what it is for.
COMMANDS = {
    "train": ("main", "pre-train or fine-tune, as a config says"),
    "generate": ("generate", "continue texts, fill gaps, chat"),
    "evaluate": ("evaluate", "run benchmark tasks with recorded settings"),
    "prepare": ("prepare", "turn text into token shards"),
    "convert": ("convert", "official weights in, your weights out, eight bits"),
    "aot": ("aot", "compile for TPUs that need not be there: memory, traffic, bounds"),
    "plot": ("plot", "draw what workdirs recorded"),
}


def usage() -> str:
    """What `illada --help` prints."""
    lines = ["usage: illada COMMAND [--option=value …]   (illada COMMAND --help lists the options)", ""]
    lines += [f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()]
    examples = ['illada generate --prompt="The with statement" --watch', "illada generate --chat",
                "illada train --config=experiments/quickstart.py", "illada help train"]
    return "\n".join([*lines, "", "examples:", *(f"  {example}" for example in examples)])


def main() -> int | None:
    """Runs the command that the first argument names, in this process."""
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
        print(f"error: illada {name}: there is no such command; {hint}", file=sys.stderr)
        return 2
    runpy.run_module(f"illada_jax.{COMMANDS[name][0]}", run_name="__main__", alter_sys=True)
    return None


if __name__ == "__main__":
    sys.exit(main())
