"""Environment variables: defaults, overrides, and a named error for a value that is not understood."""

from pathlib import Path

import pytest
from lq_formats import SpecError
from lq_kernels import env


def test_cache_dir_prefers_its_own_variable_then_xdg_then_home(monkeypatch):
    monkeypatch.setenv("LQ_CACHE_DIR", "~/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert env.cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("LQ_CACHE_DIR")
    assert env.cache_dir() == Path("/xdg/lq")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert env.cache_dir() == Path.home() / ".cache" / "lq"


@pytest.mark.parametrize(("value", "disabled"), [("", False), ("0", False), ("1", True)])
def test_booleans_are_0_or_1(monkeypatch, value, disabled):
    monkeypatch.setenv("LQ_DISABLE_CACHE", value)
    assert env.cache_disabled() is disabled


def test_anything_else_is_an_error_that_names_the_variable(monkeypatch):
    monkeypatch.setenv("LQ_DISABLE_CACHE", "yes")
    with pytest.raises(SpecError, match="LQ_DISABLE_CACHE='yes': expected 0 or 1"):
        env.cache_disabled()


def test_every_variable_that_the_package_reads_is_documented():
    import re

    import lq_kernels

    root = Path(lq_kernels.__file__).parent
    # A name before "=" is a macro that a CUDA source is compiled with.
    read = {name for path in root.rglob("*.py") for name in re.findall(r"LQ_[A-Z_]+(?!\w*=)", path.read_text())}
    assert read
    assert all(f"``{name}``" in (env.__doc__ or "") for name in read)
