"""Text of installed packages: on every machine that has this project, with no download."""

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from experiments.data.corpora import blocks, cut, file_state

PIECE = 8192  # bytes at most: some packages have few files, and long ones
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def package_files(package: str, pattern: str) -> tuple[Path, list[Path]]:
    """Return the folder of a package, which is not imported, and the files in it that match, in order.

    Raises:
        ValueError: when it is not installed, or no file of it matches.
    """
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"package={package!r} is not installed as a folder: name one that is, such as torch")
    root = Path(found.submodule_search_locations[0])
    files = sorted(path for path in root.glob(pattern) if path.is_file())
    if not files:
        raise ValueError(f"no file of {package} matches {pattern!r} (looked in {root})")
    return root, files


class InstalledFiles:
    """Files of an installed package, bytes as they are. One of more than PIECE bytes is cut after its last line end
    before that, and its pieces are documents of their own.

    Args:
        package: by its name in Python, such as torch. pattern: of the files in its folder, ** for any depth.
        name: for reports and the cache.
    """

    def __init__(self, package: str, pattern: str, name: str):
        self.package, self.pattern, self.name = package, pattern, name

    def fingerprint(self) -> str:
        root, files = package_files(self.package, self.pattern)
        return f"installed_files {PIECE} {file_state(files, root)}"

    def documents(self) -> Iterator[bytes]:
        for path in package_files(self.package, self.pattern)[1]:
            yield from cut(blocks(path), PIECE)


class Docstrings:
    """The docstrings of an installed package, English text about it: those of each module, as one document, without
    their indentation. A module that this Python cannot read, being of another version, is left out.

    Args:
        package: by its name in Python, such as scipy.
    """

    def __init__(self, package: str):
        self.package, self.name = package, f"docstrings_{package}"

    def fingerprint(self) -> str:
        root, files = package_files(self.package, "**/*.py")
        return f"docstrings {file_state(files, root)}"

    def documents(self) -> Iterator[bytes]:
        for path in package_files(self.package, "**/*.py")[1]:
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError:
                continue
            found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
            yield "\n\n".join(filter(None, found)).encode(errors="surrogatepass")
