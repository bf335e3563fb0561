"""Finds the override or the file that set a key of the composed config, so that errors can name it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from descent.config.files import PRIMARY, config_dir, option_file, shown
from descent.config.overrides import Override, shown_value

Key = tuple[str, ...]
_LEADING_KEY = re.compile(r"^([A-Za-z_]\w*(?:\.\w+)*)")


@dataclass(frozen=True)
class Sources:
    """The overrides, the chosen options and the folders of one composition."""

    overrides: tuple[Override, ...]
    choices: Mapping[str, str]
    config_dirs: tuple[str, ...]

    def override_of(self, path: Key) -> Override | None:
        """The last override that set `path`, a key inside it, or a section that contains it."""
        for override in reversed(self.overrides):
            own = override.path
            group = override.key in self.choices and len(own) == 1
            if not group and (own[: len(path)] == path or path[: len(own)] == own):
                return override
        return None

    def file_of(self, path: Key) -> Path:
        """The file that sets `path`; if no file does, the one that sets the nearest section around it.

        Where several files set the key, it is the one whose value Hydra keeps.
        """
        files = list(self._files(path[0]))
        for length in range(len(path), 0, -1):
            for file, inner in files:
                if _sets(file, path[len(inner) : length]):
                    return file
        return config_dir() / f"{PRIMARY}.yaml"

    def _files(self, top: str) -> Iterator[tuple[Path, Key]]:
        """(file, the path under which Hydra merges it), the file that overrides the others first.

        The order is the reverse of the defaults list in configs/config.yaml.
        """
        ordered = ["experiment", "batch", "", *(g for g in (top,) if g != "batch")]
        for group in ordered:
            if not group:
                yield config_dir() / f"{PRIMARY}.yaml", ()
                continue
            file = option_file(group, self.choices.get(group, "null"), self.config_dirs)
            if file is None:
                continue
            if "# @package _global_" in file.read_text(encoding="utf-8"):
                yield file, ()
            elif group == top:
                yield file, (group,)

    def where(self, path: Key) -> str:
        """The place that set `path`, for a message: `override 'key=value'`, or the file's name."""
        override = self.override_of(path) if path else None
        if override is not None:
            return str(override)
        return shown(self.file_of(path) if path else config_dir() / f"{PRIMARY}.yaml")

    def line(self, path: Key, value: Any, rule: str) -> str:
        """An error line: the place, `key=value`, and `rule`, which says what would be right.

        `key=value` is left out where the override consists of just that.
        """
        override = self.override_of(path)
        if override is not None and override.path == path:
            return f"{override}: {rule}"
        key = ".".join(path)
        setting = key if isinstance(value, Mapping) else f"{key}={shown_value(value, key)}"
        return f"{self.where(path)}: {setting}: {rule}"

    def located(self, message: str) -> str:
        """`message`, which starts with a key, preceded by the name of the file that set the key.

        The file is named if it is the user's own or an experiment. An override needs no name,
        because the user has just typed it, and neither does a default.
        """
        leading = _LEADING_KEY.match(message)
        path = tuple(leading[1].split(".")) if leading else ()
        if not path or path[0] not in _top_level(self) or self.override_of(path) is not None:
            return message
        file = self.file_of(path)
        is_default = file.is_relative_to(config_dir()) and file.parent.name != "experiment"
        return message if is_default else f"{shown(file)}: {message}"


def _top_level(sources: Sources) -> set[str]:
    from descent.config.schema import RunConfig

    return set(RunConfig.model_fields) | set(sources.choices)


def _sets(file: Path, path: Sequence[str]) -> bool:
    from omegaconf import OmegaConf

    tree: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    for part in path:
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True
