"""The folders of config files: the packaged groups, and those that a user adds with --config-dir."""

from collections.abc import Iterable
from pathlib import Path

from descent.errors import ConfigError

PRIMARY = "config"


def config_dir() -> Path:
    """The folder of the packaged configs: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent.parent / "configs"


def search_path(config_dirs: Iterable[str] = ()) -> list[Path]:
    """The packaged folder and the user's own, in the order in which Hydra looks.

    Raises ConfigError for a folder that doesn't exist, and for a file that Hydra would never read
    because an earlier folder has a file of the same name.
    """
    roots = [config_dir()]
    for given in config_dirs:
        folder = Path(given).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir={given}: there is no such folder")
        if (folder / f"{PRIMARY}.yaml").is_file():
            raise ConfigError(
                f"{shown(folder / PRIMARY)}.yaml: would not be read; "
                "put what it changes into experiment/NAME.yaml and run with experiment=NAME"
            )
        for file in folder.glob("*/**/*.yaml"):
            earlier = next((r for r in roots if (r / file.relative_to(folder)).is_file()), None)
            if earlier is not None and earlier != folder:
                group, option = _group_and_option(file, folder)
                raise ConfigError(
                    f"{shown(file)}: would not be read, {shown(earlier / group)} has {group}={option} "
                    "already; give yours another name"
                )
        roots.append(folder)
    return roots


def _group_and_option(file: Path, root: Path) -> tuple[str, str]:
    group, *option = file.relative_to(root).with_suffix("").parts
    return group, "/".join(option)


def groups(config_dirs: Iterable[str] = ()) -> dict[str, dict[str, str]]:
    """Group -> option -> one line of description.

    The description is the first comment in the option's file. A `# @package` line is not
    counted, because Hydra requires it at the top.
    """
    found: dict[str, dict[str, str]] = {}
    for root in search_path(config_dirs):
        for file in sorted(root.glob("*/**/*.yaml")):
            group, option = _group_and_option(file, root)
            lines = _text(file).splitlines()
            comments = [x for x in lines if x.startswith("#") and not x.startswith("# @")]
            line = comments[0].lstrip("# ").strip() if comments else ""
            found.setdefault(group, {})[option] = line
    return {group: dict(sorted(options.items())) for group, options in sorted(found.items())}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown(file)}: can't be read as UTF-8 text: {error}") from error


def option_file(group: str, option: str, config_dirs: Iterable[str]) -> Path | None:
    """The file of `group=option`; None if no folder has one."""
    for root in search_path(config_dirs):
        file = root / group / f"{option}.yaml"
        if file.is_file():
            return file
    return None


def shown(file: Path) -> str:
    """A config file's name for messages.

    Packaged files start with `configs/`; the user's own are relative to the current folder.
    """
    if file.is_relative_to(config_dir()):
        return str(Path("configs") / file.relative_to(config_dir()))
    current = Path.cwd()
    return str(file.relative_to(current)) if file.is_relative_to(current) else str(file)
