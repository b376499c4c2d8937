"""Saved networks: a directory `NAME.paring` with a manifest, the program, its constants, the library and a report.

    manifest.json        what it is and for which machine, with size and sha256 of every other file
    graph.ir             the lowered graph, as text
    weights.safetensors  its constants, by digest
    lib.so               the compiled library
    report.json          whatever the caller wants to keep

Nothing in it is executed before its hash has been checked, and nothing is unpickled. The hashes protect against damage, not
against an author who wishes harm: loading a library runs its code, so load what you trust, or rebuild it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from safetensors import SafetensorError, safe_open, serialize_file

from paring.backends.build import Built, Progress, build
from paring.backends.memory import plan
from paring.backends.targets import Target, for_host
from paring.ir.errors import ArgumentError, ArtifactError, IRTypeError, ParseError
from paring.ir.graph import Graph
from paring.ir.op import Array
from paring.ir.ops.core import Const, Input
from paring.ir.parser import parse
from paring.ir.text import constants, show
from paring.ir.types import DTYPES, TensorType
