"""Every task of the workspace under one name: ``nox -s tests``, ``nox -s gpu_tests``, and so on.

Sessions install through uv. With ``--no-venv`` they run in the environment that is active, for machines where
nothing can be installed (a GPU box without a network, for instance).
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_missing_interpreters = False

ROOT = Path(__file__).parent
PACKAGES = ("lq-formats", "lq-kernels", "lq-torch", "lq-eval")
PYTHONS = ["3.11", "3.12", "3.13"]


def _no_venv(session: nox.Session) -> bool:
    return session.virtualenv.venv_backend == "none"


def _sync(session: nox.Session, *groups: str) -> None:
    """Install the workspace from its lock file, with the named dependency groups."""
    if _no_venv(session):
        return
    arguments = [argument for group in groups for argument in ("--group", group)]
    session.run_install(
        "uv",
        "sync",
        "--locked",
        "--no-default-groups",
        *arguments,
        f"--python={session.virtualenv.location}",
        env={"UV_PROJECT_ENVIRONMENT": session.virtualenv.location},
    )


def _run_python(session: nox.Session, *arguments: str, env: dict[str, str] | None = None) -> None:
    executable = sys.executable if _no_venv(session) else "python"
    session.run(executable, *arguments, external=_no_venv(session), env=env)


@nox.session
def tests(session: nox.Session) -> None:
    """The CPU test suite (GPU tests skip with a reason where there is no GPU)."""
    _sync(session, "dev")
    _run_python(session, "-m", "pytest", *session.posargs)


@nox.session(python=PYTHONS)
def tests_all_pythons(session: nox.Session) -> None:
    """The CPU test suite on every supported Python that is installed."""
    _sync(session, "dev")
    _run_python(session, "-m", "pytest", *session.posargs)


@nox.session
def gpu_tests(session: nox.Session) -> None:
    """The tests marked ``gpu``: skipped with a reason without a GPU, failing instead when LQ_REQUIRE_GPU=1."""
    _sync(session, "dev")
    executable = sys.executable if _no_venv(session) else "python"
    probe = "import torch; print(torch.cuda.device_count())"
    found = session.run(executable, "-c", probe, external=_no_venv(session), silent=True)
    if str(found).strip() == "0":
        reason = "torch finds no CUDA GPU on this machine"
        if os.environ.get("LQ_REQUIRE_GPU") == "1":
            session.error(f"{reason}, and LQ_REQUIRE_GPU=1")
        session.skip(reason)
    _run_python(session, "-m", "pytest", "-m", "gpu", *session.posargs, env={"LQ_REQUIRE_GPU": "1"})


@nox.session
def exhaustive(session: nox.Session) -> None:
    """The CPU test suite with every form of every kernel: what changes a kernel runs it."""
    _sync(session, "dev")
    _run_python(
        session, "-m", "pytest", *(session.posargs or ("-n", "auto", "--dist", "worksteal")), env={"LQ_EXHAUSTIVE": "1"}
    )


@nox.session
def fuzz(session: nox.Session) -> None:
    """Read 200,000 mutated GGUF files; arguments go to pytest. LQ_GGUF_SEED=<seed> repeats a failure."""
    _sync(session, "dev")
    test = "packages/lq-formats/tests/test_gguf_fuzz.py"
    _run_python(session, "-m", "pytest", test, *session.posargs, env={"LQ_GGUF_MUTATIONS": "200000"})


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff (lint and format) and the import contracts: formats <- kernels <- torch <- eval."""
    _sync(session, "dev")
    external = _no_venv(session)
    session.run("ruff", "check", ".", external=external)
    session.run("ruff", "format", "--check", ".", external=external)
    session.run("lint-imports", external=external)


@nox.session
def types(session: nox.Session) -> None:
    """Strict mypy over the sources of all four packages."""
    _sync(session, "dev")
    sources = [f"packages/{name}/src" for name in PACKAGES]
    session.run("mypy", *sources, external=_no_venv(session))


@nox.session
def wheels(session: nox.Session) -> None:
    """Build the four wheels without workspace sources and check each alone and all together."""
    dist = Path(tempfile.mkdtemp(prefix="lq-wheels-"))
    try:
        for name in PACKAGES:
            session.run(
                "uv", "build", "--no-sources", "--wheel", "--out-dir", str(dist), f"packages/{name}", external=True
            )
        session.run(sys.executable, "tests/tools/check_wheels.py", str(dist), external=True)
        if session.posargs:
            target = Path(session.posargs[0])
            target.mkdir(parents=True, exist_ok=True)
            for wheel in dist.glob("*.whl"):
                shutil.copy(wheel, target)
    finally:
        shutil.rmtree(dist)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a broken link or reference is an error."""
    _sync(session, "docs")
    session.run("mkdocs", "build", "--strict", *session.posargs, external=_no_venv(session))


@nox.session
def bench(session: nox.Session) -> None:
    """Run the GEMM benchmark; arguments go to ``lq-eval bench gemm``."""
    _sync(session, "dev")
    _run_python(session, "-m", "lq_eval", "bench", "gemm", *session.posargs)
