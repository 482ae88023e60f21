"""`nanofed completion bash | zsh`: a script with which a shell completes commands and options; TAB itself runs no Python."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re

ACTIONS = {
    "data": ("download", "demo", "pack", "list", "verify"),
    "tokenizer": ("train", "eval"),
    "server": ("init",),
    "completion": ("bash", "zsh"),
}
ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"
SCRIPT = """\
_nanofed() {{
  local words=''
  case "${{COMP_WORDS[*]:1:$((COMP_CWORD - 1))}} " in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o bashdefault -o default -F _nanofed nanofed
"""


def main(argv: list[str]) -> int:
    """Print the script; every option in it is read from the help of its command."""
    parser = argparse.ArgumentParser(
        "nanofed completion",
        description="Print a script that completes commands, options and files, for ~/.bashrc or ~/.zshrc to read from a file.",
        epilog="nanofed completion bash > ~/.nanofed-completion && echo 'source ~/.nanofed-completion' >> ~/.bashrc",
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=ACTIONS["completion"])
    shell = parser.parse_args(argv[1:]).shell

    from nanofed.cli import COMMANDS

    cases = {"": list(COMMANDS)}  # the words before the one that is completed, and what it can be
    for command in COMMANDS:
        actions = ACTIONS.get(command, ())
        cases |= {f"{command} {action}": _options(command, action) for action in actions if command != "completion"}
        cases[command] = [*actions, *_options(command)]
    for command in ("server", "site"):
        cases[command] += cases["federate"]
    lines = [f"    '{before} '{'*' * bool(before)}) words='{' '.join(words)}' ;;" for before, words in cases.items()]
    print(ZSH * (shell == "zsh") + SCRIPT.format(cases="\n".join(lines)), end="")
    return 0


def _options(*command: str) -> list[str]:
    from nanofed.cli import COMMANDS

    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        importlib.import_module(COMMANDS[command[0]][0]).main([*command, "--help"])
    return sorted(set(re.findall(r"^\s+(?:-\w(?: \w+)?, )?(--[\w.]+)", said.getvalue(), re.MULTILINE)))
