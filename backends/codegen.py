"""From kernels to object files: the passes of TVM that change our TIR, then LLVM, several kernels in one module."""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx
from tvm.tirx.build import codegen_build

# Those of TVM's pipeline for scheduled TIR that change our TIR (`tests/test_codegen.py` compares): no blocks, no threads of GPUs,
# no loops to be unrolled or made vectors, no small floats, no buffers larger than what is used of them. StorageRewrite would
# change it, for the worse: it puts registers of different widths into one buffer, which LLVM then writes piece by piece. Checks
# of arguments are taken out: `build.py` writes every call, and the runtime checks what users give.
PASSES: tuple[tvm.transform.Pass, ...] = (
    s_tir.transform.CanonicalizeLoop(),
    s_tir.transform.StmtSimplify(),
    tirx.transform.FlattenBuffer(),
    s_tir.transform.RenormalizeSplitPattern(),
    tirx.transform.StmtSimplify(),
    s_tir.transform.RewriteUnsafeSelect(),
    tirx.transform.CommonSubexprElim(),
    tirx.transform.AnnotateEntryFunc(),
    tirx.transform.MakePackedAPI(),
    tirx.transform.SkipAssert(),
    tirx.transform.LowerTVMBuiltin(),
    tirx.transform.LowerIntrin(),
)


def lower(name: str, function: tirx.PrimFunc, target: tvm.target.Target) -> tvm.IRModule:
    """A kernel as what LLVM's code generator takes: a packed function that unpacks its arguments, and loops over pointers."""
    bound = tirx.transform.BindTarget(target.with_host(target))(tvm.IRModule({name: function}))
    return tvm.transform.Sequential(list(PASSES))(bound)


def write_object(modules: list[tvm.IRModule], target: tvm.target.Target, path: str) -> None:
    """Compile lowered kernels as one module of LLVM, each for itself, and write the object file."""
    functions = {variable: function for module in modules for variable, function in module.functions.items()}
    codegen_build(tvm.IRModule(functions, attrs=modules[0].attrs), target).write_to_file(path)
