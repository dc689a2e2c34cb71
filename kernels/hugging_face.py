"""The name `kernels`, which this package shares with one that Hugging Face publishes and that transformers uses.

transformers asks once whether that package is installed: whether a module `kernels` can be found and a distribution
of that name has a version that it likes. Beside this checkout the module that it finds is ours, and where theirs is
installed too it imports from ours what only theirs has. No setting of transformers prevents it: USE_HUB_KERNELS=NO is
read after the import.
"""

import sys
from types import ModuleType
from typing import Any, cast


def import_transformers() -> ModuleType:
    """Import transformers, with Hugging Face's package `kernels` declared absent.

    To be called before the first model of transformers is imported; later calls change nothing.

    Raises:
        ImportError: transformers is not installed.
    """
    import transformers
    from transformers.utils.import_utils import is_kernels_available

    ours = sys.modules["kernels"]
    cast(dict[str, Any], sys.modules)["kernels"] = None  # what Python takes for a module that is absent
    try:
        is_kernels_available.cache_clear()
        is_kernels_available()  # the answer is kept
    finally:
        sys.modules["kernels"] = ours
    return transformers
