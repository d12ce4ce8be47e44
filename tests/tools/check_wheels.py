"""Install freshly built wheels into clean environments: each package alone, then all four together.

Usage: ``python check_wheels.py DIST`` where DIST holds one wheel of each package. Checks that metadata versions and
the pins between the packages agree, that every import works outside of the checkout, and that ``lq-eval`` starts.
"""

import email
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# uv is on the PATH, or beside the Python that runs this script (``uv run nox`` puts it there).
UV = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
MODULES = {"lq-formats": "lq_formats", "lq-kernels": "lq_kernels", "lq-torch": "lq_torch", "lq-eval": "lq_eval"}


def main(dist: Path) -> None:
    wheels = {name: _only(dist.glob(f"{module}-*.whl")) for name, module in MODULES.items()}
    _check_metadata(wheels)
    for name in MODULES:
        _install_and_import(dist, [name], wheels)
    _install_and_import(dist, list(MODULES), wheels)
    print("wheels: metadata, pins, and imports alone and together are right")


def _only(found) -> Path:
    paths = list(found)
    if len(paths) != 1:
        raise SystemExit(f"expected exactly one wheel of each package, found {paths}")
    return paths[0]


def _check_metadata(wheels: dict[str, Path]) -> None:
    versions = {}
    for name, wheel in wheels.items():
        with zipfile.ZipFile(wheel) as archive:
            entry = next(item for item in archive.namelist() if item.endswith(".dist-info/METADATA"))
            metadata = email.message_from_bytes(archive.read(entry))
            if f"{MODULES[name]}/py.typed" not in archive.namelist():
                raise SystemExit(f"{wheel.name} ships no py.typed")
        versions[name] = metadata["Version"]
        for requirement in metadata.get_all("Requires-Dist", []):
            match = re.match(r"(lq-[a-z]+)(?:\[[^]]*\])?\s*(.*)", requirement)
            if match and match[2].split(";")[0].strip() != f"=={metadata['Version']}":
                raise SystemExit(f"{name} {metadata['Version']} requires {requirement!r}: expected the same version")
    if len(set(versions.values())) != 1:
        raise SystemExit(f"the packages are not in lockstep: {versions}")


def _install_and_import(dist: Path, names: list[str], wheels: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory(prefix="lq-wheel-env-") as folder:
        python = Path(folder, "env", "bin", "python")
        _run(UV, "venv", "--quiet", "--python", sys.executable, str(python.parents[1]))
        targets = [str(wheels[name]) for name in names]
        _run(UV, "pip", "install", "--quiet", "--python", str(python), "--find-links", str(dist), *targets)
        for name in names:
            check = f"import {MODULES[name]} as m; assert 'site-packages' in m.__file__, m.__file__; m.__all__"
            _run(str(python), "-I", "-c", check, cwd=folder)
        if "lq-eval" in names:
            _run(str(python.with_name("lq-eval")), "--help", cwd=folder)
    print(f"wheels: {' + '.join(names)} installs and imports")


def _run(*command: str, cwd: str | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
