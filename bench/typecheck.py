"""mypy over the packages that promise it. Type checkers do not read setuptools' package map, so they get a tree of links."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STRICT = ("ir", "passes")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="paring-types-") as folder:
        package = Path(folder) / "paring"
        package.mkdir()
        (package / "__init__.py").touch()
        for name in STRICT:
            (package / name).symlink_to(ROOT / name, target_is_directory=True)
        packages = [argument for name in STRICT for argument in ("-p", f"paring.{name}")]
        command = [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            str(ROOT / "pyproject.toml"),
            "--cache-dir",
            str(ROOT / ".mypy_cache"),
        ]
        return subprocess.run([*command, *packages], cwd=folder, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
