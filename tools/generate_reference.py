"""Writes the reference pages that are made from the code: settings, states, errors, command line.

``python tools/generate_reference.py`` writes them; a test checks that what is committed is what the code says.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from pathlib import Path
from typing import Any

from typer.main import get_command

from caregrid import cli, errors
from caregrid.domain import roles, settings, states

ROOT = Path(__file__).parents[1]
MADE = "<!-- made from the code by tools/generate_reference.py; edit the code, not this page -->\n\n"

SECTIONS = (
    ("[dimse]", settings.DimseSettings),
    ("[[dimse.allow]]", settings.AllowedSender),
    ("[dimse.tls], [web.tls], [destination.tls]", settings.Tls),
    ("[folder]", settings.FolderSettings),
    ("[web]", settings.WebSettings),
    ("[engine]", settings.EngineSettings),
    ("[[completion]]", settings.CompletionPolicy),
    ("[[completion.required_series]]", settings.RequiredSeries),
    ("[[destination]]", settings.Destination),
)


def settings_page() -> str:
    """Every section of site.toml, from the settings classes."""
    out = [
        MADE,
        "# site.toml\n\nAn unknown key is an error. Times are in seconds, sizes in bytes; a path is relative to the file.\n",
    ]
    out.append("\n## [site]\n\n| key | type | default |\n| --- | --- | --- |\n")
    site = {field.name: field for field in dataclasses.fields(settings.SiteSettings)}
    for key in ("name", "institution", "station_name", "data", "database", "sandbox"):
        default = {"name": "needed", "data": '"data"', "database": "SQLite in the data folder", "institution": "the name"}.get(
            key
        )
        out.append(f"| `{key}` | text | {default or _shown(site[key].default)} |\n")
    for title, kind in SECTIONS:
        out.append(f"\n## {title}\n\n{inspect.getdoc(kind)}\n\n| key | type | default |\n| --- | --- | --- |\n")
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            out.append(f"| `{field.name}` | {_type(hints[field.name])} | {_default(field)} |\n")
    out.append(
        "\n`CAREGRID_DATABASE_URL` in the environment overrides `[site] database`, so that no password need stand in the file.\n"
    )
    return "".join(out)


def _type(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _type(next(arm for arm in typing.get_args(hint) if arm is not type(None)))
    if typing.get_origin(hint) is tuple:
        return f"list of {_type(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return "table"
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}
    return words.get(hint, "table")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _shown(field.default)
    return "empty" if field.default_factory is not dataclasses.MISSING else "needed"


def _shown(value: Any) -> str:
    if value is None or value in ((), ""):
        return "none"
    return f"`{list(value) if isinstance(value, tuple) else value}`".replace("True", "true").replace("False", "false")


def states_page() -> str:
    """The state tables as diagrams, and who may do what."""
    out = [MADE, "# States and roles\n"]
    for name, table in states.TABLES.items():
        out.append(f"\n## {name}\n\n```mermaid\nstateDiagram-v2\n")
        for old, news in table.items():
            out += [f"    {_node(old)} --> {_node(new)}\n" for new in sorted(news) if new != old]
        out.append("```\n")
    out.append(
        "\n## Who may do what\n\n| action | " + " | ".join(roles.ROLES) + " |\n| --- |" + " --- |" * len(roles.ROLES) + "\n"
    )
    for action, allowed in roles.ACTIONS.items():
        out.append(f"| {action} | " + " | ".join("yes" if role in allowed else "" for role in roles.ROLES) + " |\n")
    return "".join(out)


def _node(state: str) -> str:
    return state.replace("-", "_")


def errors_page() -> str:
    """Every named error with its exit code and message."""
    out = [MADE, "# Errors\n\nThe command line ends with the exit code; pages and logs show the message.\n\n"]
    out.append("| error | kind of | exit code | message |\n| --- | --- | --- | --- |\n")
    found = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, errors.CaregridError)]
    for each in sorted(found, key=lambda kind: (kind.exit_code, len(kind.__mro__), kind.__name__)):
        words = " ".join((each.__doc__ or "").split()).replace("|", "\\|")
        out.append(f"| `{each.__name__}` | {each.__mro__[1].__name__} | {each.exit_code} | {words} |\n")
    return "".join(out)


def command_page() -> str:
    """The command line, one section a command."""
    out = [MADE, "# Command line\n\n`--home`, or `CAREGRID_HOME`, names the site's folder; it is this folder when left out.\n"]
    _command(get_command(cli.app), "caregrid", out)
    return "".join(out)


def _command(command: Any, path: str, out: list[str]) -> None:
    if hasattr(command, "commands"):
        for name, each in command.commands.items():
            if not each.hidden:
                _command(each, f"{path} {name}", out)
        return
    arguments = [f"<{each.name}>" for each in command.params if each.param_type_name == "argument"]
    out.append(f"\n## {' '.join([path, *arguments])}\n\n{inspect.cleandoc(command.help or '')}\n")
    options = [each for each in command.params if each.param_type_name == "option" and each.name not in ("home", "help")]
    if options:
        out.append("\n")
    for each in options:
        needed = " (needed)" if each.required else ""
        out.append(f"- `{each.opts[0]}`{needed}{': ' + each.help if each.help else ''}\n")


PAGES = {
    "docs/reference/settings.md": settings_page,
    "docs/reference/states.md": states_page,
    "docs/reference/errors.md": errors_page,
    "docs/reference/command-line.md": command_page,
}


def main() -> None:
    """Write every page."""
    for name, make in PAGES.items():
        (ROOT / name).write_text(make(), "utf-8")


if __name__ == "__main__":
    main()
