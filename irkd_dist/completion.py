"""`irkd completion`: what a shell offers after `irkd`, read from the parser itself."""

from __future__ import annotations

import argparse

BASH = """\
_irkd() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} offered=
  if [ "$COMP_CWORD" = 1 ]; then
    offered="{commands}"
  else
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
  fi
  case $word in -*) ;; *) [ "$COMP_CWORD" = 1 ] || offered= ;; esac
  COMPREPLY=($(compgen -W "$offered" -- "$word"))
}}
complete -o bashdefault -o default -F _irkd irkd
"""
ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"  # zsh runs bash's functions by this


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for `bash` or `zsh`: commands, their options, and files otherwise."""
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    cases = "\n".join(
        f'      {name}) offered="{" ".join(_options(command))}" ;;' for name, command in commands.items()
    )
    text = BASH.format(commands=" ".join([*commands, "--help", "--version"]), cases=cases)
    return ZSH + text if shell == "zsh" else text


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [o for action in parser._actions for o in action.option_strings if o.startswith("--")]
