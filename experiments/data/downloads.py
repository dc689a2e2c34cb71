"""Files of other machines, brought into the cache once and whole."""

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import fsspec
from filelock import FileLock

from experiments.data.corpora import in_a_line
from experiments.data.progress import watched
from experiments.data.token_data import cache_folder

BLOCK = 1 << 24  # bytes asked for at a time
LONGEST = 240  # of the name of a file, with room for ".lock"


def downloaded(url: str) -> Path:
    """Returns the file that a URL names (http://, https://, s3:// and what else fsspec knows), from the cache where it
    is there already; what a URL names is taken not to change. One process downloads, others wait for it.

    Raises:
        ValueError: it names no single file, or the file cannot be had as long as its server says that it is; nothing
            of it is kept then.
    """
    if "*" in url:
        raise ValueError(f"{url}: URLs have no patterns; name each file, as in [{url.replace('*', '1')},...]")
    name = quote(url, safe="")
    if len(name) > LONGEST:
        raise ValueError(f"{url[:80]}... is longer than the name of a file can be: download it, and name what is there")
    path = cache_folder() / "files" / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        unfinished = Path(f"{path}.tmp")
        try:
            if not path.exists():
                with open(unfinished, "wb") as file:
                    for block in _blocks(url):
                        file.write(block)
                os.replace(unfinished, path)
        except Exception as error:  # of the network and of file systems, each library with errors of its own
            raise ValueError(
                f"{url} cannot be downloaded ({in_a_line(error)}): start again when it can, whole files are kept"
            ) from error
        finally:
            unfinished.unlink(missing_ok=True)
    return path


def _blocks(url: str) -> Iterator[bytes]:
    # Each asked for by itself: aiohttp gives one answer five minutes at most.
    files, path = fsspec.url_to_fs(url)
    size = files.size(path)
    if size is None:
        raise ValueError("its server does not say how long it is")

    def blocks() -> Iterator[bytes]:
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            block = files.cat_file(path, start, stop)
            if len(block) != stop - start:
                raise ValueError(f"{len(block)} bytes came for {start} to {stop} of {size}")
            yield block

    return watched(blocks(), f"downloading {url}", size)
