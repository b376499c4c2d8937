"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="file.py:factory, module:factory, or a dumped .ir file.", show_default=False)]
TargetName = Annotated[str, typer.Option("--target", "-t", help="What to compile for: see `paring passes` for the names.")]
Passes = Annotated[str | None, typer.Option(help="Passes to run before the target's own, like 'cse, fuse{max_nodes=8}'.")]
Pipeline = Annotated[str | None, typer.Option(help="Passes to run instead of the target's own.")]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE.py:PASS",
        help="A pass of your own. It replaces a pass of its name; runs first if --passes and --pipeline do not name it.",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|FUNCTION",
        help="Data for --passes quantize and the like: .npy or .npz, batches along the first axis; or file.py:function.",
    ),
]
Dump = Annotated[Path | None, typer.Option(metavar="DIR", help="Write the program after each changing pass here.")]
Device = Annotated[str | None, typer.Option(help="Where a foreign target's code runs: emulator or rpc://127.0.0.1:PORT.")]
Seed = Annotated[int, typer.Option(help="Seed of random inputs.")]
