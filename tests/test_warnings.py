"""Which warnings are errors in these tests: our own are, a library's are not."""

import warnings

import pytest

from svdtune import SvdtuneWarning

OURS = [
    (SvdtuneWarning, "run"),
    (UserWarning, "svdtune"),
    (RuntimeWarning, "svdtune.linalg.factors"),
    (ResourceWarning, "svdtune.system"),
    (UserWarning, "peft.tuners.tuners_utils"),
    (RuntimeWarning, "numpy.core._methods"),
    (ResourceWarning, "test_run"),
    (pytest.PytestUnraisableExceptionWarning, "run"),
]
THEIRS = [
    (DeprecationWarning, "svdtune.training.run"),
    (FutureWarning, "svdtune.training.run"),
    (PendingDeprecationWarning, "peft.peft_model"),
    (UserWarning, "transformers.generation.utils"),
    (RuntimeWarning, "triton.runtime"),
    (UserWarning, "svdtunes"),
]


def warn(category: type[Warning], module: str, text: str = "text") -> None:
    warnings.warn_explicit(text, category, "a file", 1, module=module)


@pytest.mark.parametrize(("category", "module"), OURS)
def test_our_warnings_are_errors(category, module):
    with pytest.raises(category):
        warn(category, module)


@pytest.mark.parametrize(("category", "module"), THEIRS)
def test_a_librarys_warnings_are_listed(category, module):
    with warnings.catch_warnings(record=True) as listed:
        warn(category, module)
    assert [warning.category for warning in listed] == [category]


def test_what_will_change_fails_nothing_in_whatever_class_a_library_says_it():
    with warnings.catch_warnings(record=True) as listed:
        warn(UserWarning, "svdtune.training.run", "the old way\nis Deprecated")
    assert len(listed) == 1
    with pytest.raises(SvdtuneWarning):
        warn(SvdtuneWarning, "svdtune.training.run", "a deprecated setting")
