"""Rows of a known suite, from the Hub or a copy on disk, through the library `datasets`; and its commit.

A data set's code never runs: the files are Parquet, CSV or pictures with a table.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pyarrow as pa

from exitsafe.data.known import KnownSuite
from exitsafe.errors import InputError

if TYPE_CHECKING:
    from types import ModuleType

    from datasets import Dataset, IterableDataset

    Rows: TypeAlias = Dataset | IterableDataset

_COMMIT = re.compile(r"[0-9a-f]{40}")
Values = dict[str, object]
HubRow = tuple[str, int, Values]


def hub_rows(suite: KnownSuite, *, folder: Path | None = None, is_limited: bool = False) -> Iterator[HubRow]:
    """Configuration, index and values of every row; pictures, videos and audio stay encoded.

    Args:
        suite: The suite to load.
        folder: A copy on disk, laid out as on the Hub, instead of the Hub.
        is_limited: Whether the caller will stop early; a large set is then read row by row.

    Raises:
        InputError: If the set is not available or lacks a column.
    """
    if suite.is_large and folder is None and not is_limited:
        raise InputError(f"{suite.name} has {suite.size} samples: choose how many with --limit N (the first N)")
    with _in_one_line(suite, folder):
        library = import_datasets()
        where = suite.hub_id if folder is None else str(folder)
        for config in suite.configs or ("",):
            if folder is None:
                dataset = _load_from_hub(library, suite, config)
            else:
                dataset = _load_from_folder(library, suite, config, folder)
            if dataset.column_names:  # unknown before the first row of some streams
                check_columns(suite, dataset.column_names, where=where)
            for field, column in suite.media.items() if not suite.is_by_path else ():
                feature = {"image": library.Image, "video": library.Video, "audio": library.Audio}[field]
                dataset = dataset.cast_column(column, feature(decode=False))
            for index, values in enumerate(dataset):
                if index == 0:
                    check_columns(suite, list(values), where=where)
                yield config, index, values


def resolve_commit(suite: KnownSuite) -> str | None:
    """The commit of the set that `hub_rows` will read: the pinned one, else the Hub's newest, else the cached one.

    None means that the set is neither pinned nor available; loading it says what to do.

    Raises:
        InputError: If the Hub refuses access.
    """
    if suite.revision is not None:
        return suite.revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().dataset_info(suite.hub_id).sha
    except HfHubHTTPError as error:
        raise _explain(error, suite, None) from error
    except (OSError, _http_error()):  # no network: use the cache
        return _cached_commit(suite)


def is_commit(revision: object) -> bool:
    """Whether a revision is a full commit hash, not a branch, which may move."""
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def import_datasets() -> ModuleType:
    """The library `datasets`, quiet unless stderr is a terminal.

    Raises:
        InputError: If it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError('known suites need the library datasets: pip install "exitsafe[hub]"') from error
    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    library: ModuleType = datasets
    return library


def check_columns(suite: KnownSuite, found: list[str], *, where: str) -> None:
    """Raise InputError if rows lack columns that the suite's rows must have."""
    missing = [name for name in suite.columns if name not in found]
    if missing:
        available = ", ".join(map(repr, found[:12])) or "none"
        raise InputError(
            f"{suite.name}: {where} has no column {', '.join(map(repr, missing))}, only {available}; give another copy"
        )


def _load_from_hub(library: ModuleType, suite: KnownSuite, config: str) -> Rows:
    is_streamed = suite.is_large and not library.config.HF_HUB_OFFLINE
    dataset = library.load_dataset(
        suite.hub_id, config or None, split=suite.split, revision=suite.revision, streaming=is_streamed
    )
    # without a network, datasets uses any cached copy
    if not is_streamed and suite.revision is not None:
        commit = _commit_of(dataset)
        if commit not in (None, suite.revision):
            raise InputError(
                f"{suite.name}: the cached copy of {suite.hub_id} is commit {commit}, not {suite.revision}; load it "
                "once with network access"
            )
    return dataset


def _load_from_folder(library: ModuleType, suite: KnownSuite, config: str, folder: Path) -> Rows:
    if (folder / "README.md").is_file():  # its header describes the files
        return library.load_dataset(str(folder), config or None, split=suite.split, streaming=suite.is_large)
    if len(suite.configs) > 1:
        raise InputError(f"{suite.name}: {folder} has no README.md to describe its files; {_how_to_copy(suite)}")
    splits = library.load_dataset(str(folder), streaming=suite.is_large)
    if suite.split not in splits and len(splits) > 1:
        raise InputError(
            f"{suite.name}: {folder} has no split {suite.split}, only {', '.join(splits)}; {_how_to_copy(suite)}"
        )
    return splits[suite.split if suite.split in splits else next(iter(splits))]


def _commit_of(dataset: Dataset) -> str | None:
    """The commit of a cached set, after which `datasets` names the cache's folder."""
    files = dataset.cache_files
    name = Path(files[0]["filename"]).parent.name if files else ""
    return name if is_commit(name) else None


def _cached_commit(suite: KnownSuite) -> str | None:
    try:
        library = import_datasets()
    except InputError:
        return None
    # the library's own rule for naming the folder
    from datasets.naming import camelcase_to_snakecase

    owner, _, name = suite.hub_id.partition("/")
    cache = Path(library.config.HF_DATASETS_CACHE).expanduser() / f"{owner}___{camelcase_to_snakecase(name)}"
    found = [path for path in cache.glob("*/*/*") if is_commit(path.name)]
    return max(found, key=lambda path: path.stat().st_mtime).name if found else None


@contextmanager
def _in_one_line(suite: KnownSuite, folder: Path | None) -> Iterator[None]:
    # DatasetsError does not derive from a built-in error, and exists only where datasets is installed
    kinds: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, _http_error(), pa.ArrowException)
    try:
        from datasets.exceptions import DatasetsError
    except ImportError:
        pass
    else:
        kinds = (*kinds, DatasetsError)
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise _explain(error, suite, folder) from error


def _http_error() -> type[Exception]:
    """The base class of errors in the HTTP library under the Hub's client, which depends on the client's version."""
    from huggingface_hub.errors import HfHubHTTPError

    root: type[Exception] = HfHubHTTPError.__mro__[1]
    return root


def _explain(error: Exception, suite: KnownSuite, folder: Path | None) -> InputError:
    """An error from the Hub's libraries in one line that never contains a row's text."""
    chain = list(_causes(error))
    texts = " ".join(str(link) for link in chain)
    problem = _hub_problem(chain, texts, suite) if folder is None else None
    if problem is not None:
        return InputError(problem)
    where = suite.hub_id if folder is None else str(folder)
    if "BuilderConfig" in texts or "Unknown split" in texts:
        wanted = "/".join(filter(None, [" or ".join(suite.configs), suite.split]))
        return InputError(f"{suite.name}: {where} has no {wanted}; {_how_to_copy(suite)}")
    # some of the library's messages quote rows
    reason = type(chain[-1]).__name__
    return InputError(f"{suite.name}: {where} cannot be loaded ({reason}); {_how_to_copy(suite)}")


def _hub_problem(chain: list[BaseException], texts: str, suite: KnownSuite) -> str | None:
    """Why the Hub did not provide a set and what to do; None for other reasons."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if has(GatedRepoError) or "gated dataset" in texts:
        return f"{suite.name} is gated: accept its terms at {suite.page} and log in with `hf auth login`"
    if "Revision '" in texts and "doesn't exist" in texts:
        return f"{suite.name}: {suite.hub_id} no longer has commit {suite.revision}; {_how_to_copy(suite)}"
    if has(RepositoryNotFoundError) or "doesn't exist on the Hub" in texts:
        return (
            f"{suite.name}: {suite.hub_id} is not on the Hub or is private: log in with `hf auth login`, or give a "
            f"copy with --suite {suite.name}=PATH"
        )
    unreachable = {"ConnectError", "ConnectTimeout", "ReadTimeout", "TimeoutException", "NetworkError"}
    is_unreachable = has(OfflineModeIsEnabled, ConnectionError, TimeoutError)
    if is_unreachable or "Couldn't find cache" in texts or unreachable & {type(link).__name__ for link in chain}:
        return (
            f"{suite.name} is not on this machine and the Hub cannot be reached; on a machine with network access, "
            f"{_how_to_copy(suite)}"
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _how_to_copy(suite: KnownSuite) -> str:
    revision = f" --revision {suite.revision}" if suite.revision else ""
    part = f' --include "*{suite.split}*"' if suite.is_large else ""
    return (
        f"run `hf download {suite.hub_id} --repo-type dataset{revision}{part} --local-dir DIR` and give "
        f"--suite {suite.name}=DIR"
    )
