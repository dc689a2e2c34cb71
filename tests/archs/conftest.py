"""Models are tested beside those of transformers, which must not take our package `kernels` for the Hub's."""

from contextlib import suppress

from kernels.hugging_face import import_transformers

with suppress(ImportError):  # then those tests are skipped
    import_transformers()
