"""The errors that Paring raises on purpose; all derive from ParingError."""

from paring.ir.errors import (
    ArgumentError,
    ArtifactError,
    ContractError,
    InputError,
    InternalError,
    IRTypeError,
    MismatchError,
    ModelError,
    ParingError,
    ParseError,
    TargetError,
    UnsupportedOpsError,
    VerifyError,
)

__all__ = [
    "ArgumentError",
    "ArtifactError",
    "ContractError",
    "IRTypeError",
    "InputError",
    "InternalError",
    "MismatchError",
    "ModelError",
    "ParingError",
    "ParseError",
    "TargetError",
    "UnsupportedOpsError",
    "VerifyError",
]
