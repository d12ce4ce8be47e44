"""Environment variables: defaults, overrides, and a named error for a value that is not understood."""

import warnings
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


HOMELESS = "~no-such-user-of-lq/cache"


@pytest.mark.parametrize("name", ["LQ_CACHE_DIR", "XDG_CACHE_HOME", None])
def test_a_home_that_cannot_be_found_is_an_error_that_says_what_to_set(monkeypatch, name):
    for each in ("LQ_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(each, raising=False)
    if name is None:  # a container's user that has no entry
        pwd = pytest.importorskip("pwd")
        monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    else:
        monkeypatch.setenv(name, HOMELESS)
    with pytest.raises(SpecError, match=r"'~.*cannot be found; set LQ_CACHE_DIR to an absolute folder"):
        env.cache_dir()


def test_a_cache_without_a_folder_costs_one_warning_and_none_where_it_is_switched_off(monkeypatch, tmp_path):
    monkeypatch.setattr(env, "_warned", False)
    monkeypatch.setenv("LQ_CACHE_DIR", HOMELESS)
    monkeypatch.setenv("LQ_DISABLE_CACHE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert env.usable_cache_dir() is None
    monkeypatch.delenv("LQ_DISABLE_CACHE")
    with pytest.warns(UserWarning, match="set LQ_CACHE_DIR to an absolute folder, or LQ_DISABLE_CACHE=1") as caught:
        assert [env.usable_cache_dir() for _ in range(3)] == [None] * 3
    assert len(caught) == 1
    monkeypatch.setenv("LQ_CACHE_DIR", str(tmp_path))
    assert env.usable_cache_dir() == tmp_path
    monkeypatch.setenv("LQ_DISABLE_CACHE", "yes")
    with pytest.raises(SpecError, match="expected 0 or 1"):
        env.usable_cache_dir()


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
