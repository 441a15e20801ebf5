"""The build: pyproject.toml says everything but one thing, the commit that a wheel is built from (`fds/_build.py`)."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def git(*arguments):
    """What git says about this checkout, or None where there is none (a source archive)."""
    if not (ROOT / ".git").exists():  # or an outer repository would answer
        return None
    try:
        found = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


class BuildWithCommit(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            text = f"GIT_HASH = {git('rev-parse', '--short', 'HEAD')!r}\nGIT_BRANCH = {git('rev-parse', '--abbrev-ref', 'HEAD')!r}\n"
            (Path(self.build_lib) / "fds" / "_build.py").write_text(text)


setup(cmdclass={"build_py": BuildWithCommit})
