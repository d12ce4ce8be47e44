"""What no tracked file says: the host of a package registry, or a folder of the machine it was written on."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

# Put together from parts, so that this file does not contain them.
REGISTRY_HOSTS = tuple(
    "".join(parts)
    for parts in (
        ("py", "pi.org"),
        ("python", "hosted.org"),
        ("download.py", "torch.org"),
        ("py", "pi.nvidia.com"),
        ("registry.n", "pmjs.org"),
        ("crates", ".io"),
        ("conda.ana", "conda.org"),
        ("proxy.go", "lang.org"),
        ("rubygems", ".org"),
    )
)
FOLDERS = tuple("/" + name + "/" for name in ("work", "root", "home", "Users"))
# uv.lock names the registry that it locks.
EXEMPT = {"uv.lock"}

_HOST = re.compile("|".join(map(re.escape, REGISTRY_HOSTS)).encode())
# A folder at the root of a file system: not a part of a longer path or of an address.
_FOLDER = re.compile(rb"(?<![\w.\-$}>~*])(?:" + "|".join(map(re.escape, FOLDERS)).encode() + rb")")


@pytest.fixture(scope="module")
def tracked(root: Path) -> list[Path]:
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("not a git checkout: there are no tracked files")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout
    paths = [root / name for name in listed.decode().split("\0") if name and name not in EXEMPT]
    return [path for path in paths if path.is_file()]


def _found(pattern: re.Pattern[bytes], paths: list[Path], root: Path) -> list[str]:
    hits = []
    for path in paths:
        content = path.read_bytes()
        for match in pattern.finditer(content):
            line = content.count(b"\n", 0, match.start()) + 1
            hits.append(f"{path.relative_to(root)}:{line}: {match.group().decode()}")
    return hits


def test_no_file_names_a_package_registry(tracked: list[Path], root: Path) -> None:
    assert _found(_HOST, tracked, root) == []


def test_no_file_names_a_folder_of_a_build_machine(tracked: list[Path], root: Path) -> None:
    assert _found(_FOLDER, tracked, root) == []


@pytest.mark.parametrize("text", [f"see {FOLDERS[0]}x", f'"{FOLDERS[1]}.cache"', f"cd {FOLDERS[2]}me"])
def test_the_folder_pattern_finds_absolute_paths(text: str) -> None:
    assert _FOLDER.search(text.encode())


@pytest.mark.parametrize("text", [f"$HOME{FOLDERS[0]}x", f"docs.example{FOLDERS[1]}x", f"a{FOLDERS[2]}b"])
def test_the_folder_pattern_leaves_longer_paths(text: str) -> None:
    assert not _FOLDER.search(text.encode())
