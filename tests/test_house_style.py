"""Rules of the workspace that no linter knows: what a module may be called, where operators live, one version."""

import ast
import importlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("lq_formats", "lq_kernels", "lq_torch", "lq_eval")
# A file with one of these names has no subject: put the function where its concept is.
NAMELESS = {"utils", "util", "helpers", "common", "misc"}
LONGEST_MODULE = 500


def _modules(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_have_a_subject_a_docstring_and_a_bound(package: str, source_folders: dict[str, Path]) -> None:
    problems = []
    for path in _modules(source_folders[package]):
        text = path.read_text()
        if path.stem in NAMELESS:
            problems.append(f"{path.name}: name it after what it holds")
        docstring = ast.get_docstring(ast.parse(text))
        if text.strip() and not docstring:
            problems.append(f"{path}: no module docstring")
        if text.count("\n") > LONGEST_MODULE and "long" not in (docstring or "").lower():
            problems.append(f"{path}: above {LONGEST_MODULE} lines, and the docstring does not say why it is so long")
    assert problems == []


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_exist_once_and_in_order(package: str) -> None:
    module = importlib.import_module(package)
    names = list(module.__all__)
    assert len(set(names)) == len(names)
    missing = [name for name in names if not hasattr(module, name)]
    assert missing == []
    # Constants, then classes, then functions, each in order: what ruff's RUF022 sorts by.
    assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed_and_has_a_readme(package: str, source_folders: dict[str, Path]) -> None:
    source = source_folders[package]
    assert (source / package / "py.typed").is_file()
    assert (source.parent / "README.md").read_text().strip()


def test_operators_are_registered_in_one_file(source_folders: dict[str, Path]) -> None:
    users = set()
    for folder in source_folders.values():
        for path in _modules(folder):
            for node in ast.walk(ast.parse(path.read_text())):
                attribute = isinstance(node, ast.Attribute) and node.attr == "library" and ast.unparse(node.value)
                imported = isinstance(node, ast.ImportFrom) and node.module == "torch.library"
                if attribute == "torch" or imported:
                    users.add(path.relative_to(folder).as_posix())
    # The second says what kind of library the first registers them in.
    assert users == {"lq_kernels/ops.py", "lq_kernels/derivatives.py"}


def test_versions_and_pins_move_in_lockstep(source_folders: dict[str, Path]) -> None:
    projects = [
        tomllib.loads((folder.parent / "pyproject.toml").read_text())["project"] for folder in source_folders.values()
    ]
    versions = {project["version"] for project in projects}
    assert len(versions) == 1
    version = versions.pop()
    names = {project["name"] for project in projects}
    for project in projects:
        extras = [item for items in project.get("optional-dependencies", {}).values() for item in items]
        pins = [item for item in [*project["dependencies"], *extras] if item.startswith("lq-")]
        assert all(item.split("==")[0].split("[")[0] in names and item.endswith(f"=={version}") for item in pins), pins


def test_test_folders_are_not_packages(root: Path) -> None:
    # --import-mode=importlib: files of one name in two packages, and no imports between test files.
    found = [
        path.relative_to(root).as_posix()
        for path in (*root.glob("packages/*/tests"), root / "tests")
        for path in path.rglob("__init__.py")
    ]
    assert found == []
