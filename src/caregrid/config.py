"""Reads site.toml and the environment once. An unknown key is an error, with a hint at the nearest known one.

Environment: ``CAREGRID_DATABASE_URL`` overrides ``[site] database`` (so that a password need not stand in the file).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from caregrid.domain.settings import (
    CompletionPolicy,
    Destination,
    DimseSettings,
    EngineSettings,
    FolderSettings,
    SiteSettings,
    WebSettings,
)
from caregrid.errors import BadSetting, SiteMissing, UnknownSetting

FILE = "site.toml"
DATABASE_ENVIRONMENT = "CAREGRID_DATABASE_URL"

#: Sections that become a settings class of their own.
_SECTIONS: dict[str, type[Any]] = {
    "dimse": DimseSettings,
    "folder": FolderSettings,
    "web": WebSettings,
    "engine": EngineSettings,
}
_CHOICES: dict[tuple[type[Any], str], tuple[str, ...]] = {
    (CompletionPolicy, "at_ceiling"): ("proceed", "hold"),
    (CompletionPolicy, "late"): ("rerun", "ignore", "ask"),
    (Destination, "kind"): ("cstore", "stow", "folder"),
}
_SITE_KEYS = ("name", "data", "database", "institution", "station_name", "sandbox")
_SITE_KEYS = ("name", "data", "database", "institution", "station_name", "sandbox")
_TOP = ("site", "dimse", "folder", "web", "engine", "completion", "destination")


def read_site(home: Path) -> SiteSettings:
    """The settings of the site at ``home``. Raises SiteMissing, UnknownSetting or BadSetting."""
    file = home.resolve() / FILE
    if not file.is_file():
        raise SiteMissing(path=home)
    try:
        tree = tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadSetting(file=file, key="(file)", reason=f"is not TOML: {error}") from error
    return _Reader(file).site(tree)


class _Reader:
    """Turns the TOML tree into settings, keeping the file at hand for messages."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.home = file.parent

    def site(self, tree: dict[str, Any]) -> SiteSettings:
        self._known(tree, _TOP, "")
        top = self._mapping(tree.get("site", {}), "site")
        self._known(top, _SITE_KEYS, "site.")
        if not top.get("name"):
            raise BadSetting(file=self.file, key="site.name", reason="is missing")
        data = self._path(top.get("data", "data"))
        settings = SiteSettings(
            name=self._convert(top["name"], str, "site.name"),
            home=self.home,
            data=data,
            database_url=os.environ.get(DATABASE_ENVIRONMENT) or top.get("database") or f"sqlite:///{data / 'site.db'}",
            institution=self._convert(top.get("institution", top["name"]), str, "site.institution"),
            station_name=self._convert(top.get("station_name", "CAREGRID"), str, "site.station_name"),
            sandbox=self._convert(top.get("sandbox", "bubblewrap"), str, "site.sandbox"),
            completion=self._completion(tree.get("completion", [])),
            destinations=self._destinations(tree.get("destination", [])),
            **{name: self._fill(kind, tree.get(name, {}), name) for name, kind in _SECTIONS.items()},
        )
        self._check_references(settings)
        return settings

    def _completion(self, rows: Any) -> tuple[CompletionPolicy, ...]:
        policies = tuple(
            self._fill(CompletionPolicy, row, f"completion[{n}]") for n, row in enumerate(self._list(rows, "completion"))
        )
        if not any(policy.source == "*" for policy in policies):
            policies += (CompletionPolicy(),)
        return policies

    def _destinations(self, rows: Any) -> tuple[Destination, ...]:
        found = tuple(self._fill(Destination, row, f"destination[{n}]") for n, row in enumerate(self._list(rows, "destination")))
        names = [destination.name for destination in found]
        for name in names:
            if names.count(name) > 1:
                raise BadSetting(file=self.file, key="destination.name", reason=f"{name} stands twice")
        needed = {"cstore": ("host", "port", "ae_title"), "stow": ("url",), "folder": ("path",)}
        for destination in found:
            for key in needed[destination.kind]:
                if not getattr(destination, key):
                    raise BadSetting(file=self.file, key=f"destination.{destination.name}.{key}", reason="is missing")
        return found

    def _check_references(self, settings: SiteSettings) -> None:
        names = {destination.name for destination in settings.destinations}
        for policy in settings.completion:
            if policy.expected_from and policy.expected_from not in names:
                raise BadSetting(
                    file=self.file, key="completion.expected_from", reason=f"names no destination: {policy.expected_from}"
                )

    def _fill(self, kind: type[Any], values: Any, where: str) -> Any:
        values = self._mapping(values, where)
        hints = get_type_hints(kind)
        self._known(values, tuple(hints), f"{where}.")
        filled = {key: self._convert(value, hints[key], f"{where}.{key}") for key, value in values.items()}
        for key, value in filled.items():
            choices = _CHOICES.get((kind, key))
            if choices and value not in choices:
                raise BadSetting(file=self.file, key=f"{where}.{key}", reason=f"must be one of {', '.join(choices)}, not {value}")
        try:
            return kind(**filled)
        except TypeError as error:
            missing = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
            raise BadSetting(file=self.file, key=where, reason=f"needs {', '.join(missing)}") from error

    def _convert(self, value: Any, hint: Any, where: str) -> Any:
        """``value`` as the annotated type of its field."""
        if get_origin(hint) in (typing.Union, types.UnionType):
            hint = next(arm for arm in get_args(hint) if arm is not type(None))
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return self._fill(hint, value, where)
        if get_origin(hint) is tuple:
            item = get_args(hint)[0]
            return tuple(self._convert(each, item, f"{where}[{n}]") for n, each in enumerate(self._list(value, where)))
        if get_origin(hint) is dict:
            return {str(key): str(each) for key, each in self._mapping(value, where).items()}
        if hint is Path:
            return self._path(self._convert(value, str, where))
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
            raise BadSetting(file=self.file, key=where, reason=f"must be {hint.__name__}, not {type(value).__name__}")
        return value

    def _path(self, text: str) -> Path:
        return (self.home / Path(text).expanduser()).resolve()

    def _known(self, values: dict[str, Any], known: tuple[str, ...], prefix: str) -> None:
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known here: {', '.join(known)}"
                raise UnknownSetting(file=self.file, key=f"{prefix}{key}", hint=hint)

    def _mapping(self, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise BadSetting(file=self.file, key=where, reason="must be a table")
        return value

    def _list(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise BadSetting(file=self.file, key=where, reason="must be a list")
        return value
