"""TVM's aarch64 wheels: which files they are, and what the emulated device takes of them."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Collection
from pathlib import Path

# sha256 of the files on PyPI, for pip to check: what is in them runs here with the user's rights, emulated or not.
HASHES: dict[str, tuple[str, ...]] = {
    "apache-tvm==0.27.0.post1": ("4acfdb7653e4e1ba7a707bdf2833db72eb8fda7d04d99141f2a4e1da43171fb7",),
    "apache-tvm-ffi==0.1.14.post1": (
        "79c69493bd607b3e37e69ce542bc551833bfa40d0ba208f37fb87dd30cf86e69",  # Python 3.10
        "c7a759781d4fbf2b99fa12f2741f250b882b06acc2747bb02831d491d1ac7d3c",  # 3.11
        "3fd2255a2e363a40c51ec1eeedb1110a2c74e443f95ae351ee5a81b5ff6808cf",  # 3.12
        "d6aebe30f21dcbd9e76c5aab56afe0fe228804a4ad73e413b067ae3d27e02f93",  # 3.13
        "8d4a0f356bbc89a648841b8a913a98478a65dc006c05017ca80f539c35974d96",  # 3.14
    ),
}


def pinned(requirement: str) -> str:
    """A line for pip's requirements file that allows the known files alone. Raises KeyError for an unknown version."""
    return " ".join([requirement, *(f"--hash=sha256:{digest}" for digest in HASHES[requirement])])


def unpack(wheel: Path, target: Path, libraries: Collection[str]) -> None:
    """Take these libraries and the C++ headers, and leave the rest: the compiler alone is 240 MB."""
    wanted = re.compile(r"(?:tvm|tvm_ffi)/lib/(?P<library>\w+\.so)|tvm_ffi/include/(?P<header>(?:[\w-]+/)*[\w-]+\.h)")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            match = wanted.fullmatch(name)
            if match is None or (match["library"] and match["library"] not in libraries):
                continue
            path = target / (match["library"] or f"include/{match['header']}")
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
