"""The wheel has every module: sub-packages are listed by hand in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

IMPORT_ALL = """
import importlib, pkgutil, sys
import paring
assert paring.__file__.startswith(sys.argv[1]), paring.__file__
optional = {"onnx", "onnxruntime", "openvino", "sklearn", "timm", "torchvision", "transformers", "hypothesis"}
names = [m.name for m in pkgutil.walk_packages(paring.__path__, "paring.") if not m.name.endswith("__main__")]
for name in names:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in optional:
            raise
        continue
    assert module.__file__.startswith(sys.argv[1]), module.__file__
print(len(names))
"""


def test_every_module_of_the_wheel_imports(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, cwd=tmp_path, capture_output=True)
    (wheel,) = tmp_path.glob("paring-*.whl")
    home = tmp_path / "home"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(home), str(wheel)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(home)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    sources = [p for f in ("ir", "passes", "backends", "autotune", "frontends", "bench") for p in (ROOT / f).rglob("*.py")]
    modules = [p for p in sources if p.name not in ("__init__.py", "__main__.py")]
    assert int(done.stdout) >= len(modules)
