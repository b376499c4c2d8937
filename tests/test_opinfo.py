"""PyTorch's own samples (OpInfo, float32) of the operators that Paring supports, none skipped silently.

Every operator of `op_db` is run, or stands in `REFUSED`, `PARTLY` or `NOT_RUN` with the reason. Many samples share one export,
because tracing costs more than checking. The fast test takes `FAST_SAMPLES` of each operator; the slow one takes all, and
checks the refusals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

from paring.frontends.oracle import TORCH_FACTOR, ratios, reference
from paring.frontends.torch_export import import_model
from paring.ir import interpret
from paring.ir.errors import ModelError, UnsupportedOpsError

pytest.importorskip("expecttest", reason="torch's OpInfo needs expecttest")
from torch.testing._internal.common_methods_invocations import op_db

FAST_SAMPLES = 2
GROUP = 8
# --- tables: torch 2.13 ---
REFUSED = {
    "no form in the IR": """
        _segment_reduce.lengths _segment_reduce.offsets _unsafe_masked_index_put_accumulate _upsample_bilinear2d_aa acos
        acosh angle argsort as_strided as_strided.partial_views as_strided_copy as_strided_scatter asin asinh atan atan2
        atanh bucketize cdist cholesky cholesky_inverse cholesky_solve copysign cummax cummin cumprod diagonal_scatter
        digamma erfinv frexp geqrf grid_sampler_3d half histc histogram histogramdd hypot i0 igamma igammac index_add
        index_copy index_fill index_put index_reduce.amax index_reduce.amin index_reduce.mean index_reduce.prod kthvalue
        lgamma linalg.cholesky linalg.cholesky_ex linalg.cond linalg.det linalg.eigh linalg.eigvalsh
        linalg.householder_product linalg.inv linalg.inv_ex linalg.ldl_factor linalg.ldl_factor_ex linalg.ldl_solve
        linalg.lu linalg.lu_factor linalg.lu_factor_ex linalg.lu_solve linalg.pinv linalg.pinv.hermitian
        linalg.pinv.singular linalg.qr linalg.slogdet linalg.solve linalg.solve_ex linalg.solve_triangular linalg.svd
        linalg.svdvals linalg.tensorinv linalg.tensorsolve linalg.vander logcumsumexp logdet lu lu_solve lu_unpack
        masked.cumprod masked.median masked_scatter matrix_exp max_pool2d_with_indices_backward median mode msort
        mvlgamma.mvlgamma_p_1 mvlgamma.mvlgamma_p_3 mvlgamma.mvlgamma_p_5 nanmedian nanquantile native_group_norm
        native_layer_norm nextafter nn.functional.adaptive_avg_pool3d nn.functional.adaptive_max_pool1d
        nn.functional.adaptive_max_pool2d nn.functional.conv3d nn.functional.conv_transpose3d nn.functional.embedding_bag
        nn.functional.linear_cross_entropy.chunked nn.functional.linear_cross_entropy.chunked_none
        nn.functional.max_unpool1d nn.functional.max_unpool1d.grad nn.functional.max_unpool2d
        nn.functional.max_unpool2d.grad nn.functional.max_unpool3d nn.functional.max_unpool3d.grad
        nn.functional.pad.replicate_negative nn.functional.pdist nonzero_static norm.nuc ormqr pinverse
        polygamma.polygamma_n_0 polygamma.polygamma_n_1 polygamma.polygamma_n_2 polygamma.polygamma_n_3
        polygamma.polygamma_n_4 put qr quantile resize_ resize_as_ scatter scatter_add scatter_reduce.amax
        scatter_reduce.amin scatter_reduce.mean scatter_reduce.prod scatter_reduce.sum searchsorted signbit sort
        special.airy_ai special.bessel_j0 special.bessel_j1 special.bessel_y0 special.bessel_y1
        special.chebyshev_polynomial_t special.chebyshev_polynomial_u special.chebyshev_polynomial_v
        special.chebyshev_polynomial_w special.erfcx special.hermite_polynomial_h special.hermite_polynomial_he special.i0e
        special.i1 special.i1e special.laguerre_polynomial_l special.legendre_polynomial_p special.log_ndtr
        special.modified_bessel_i0 special.modified_bessel_i1 special.modified_bessel_k0 special.modified_bessel_k1
        special.ndtri special.polygamma.special_polygamma_n_0 special.scaled_modified_bessel_k0
        special.scaled_modified_bessel_k1 special.shifted_chebyshev_polynomial_t special.shifted_chebyshev_polynomial_u
        special.shifted_chebyshev_polynomial_v special.shifted_chebyshev_polynomial_w special.spherical_bessel_j0
        special.zeta svd topk triangular_solve unique_consecutive
    """,
    "results are random": """
        _native_batch_norm_legit bernoulli multinomial nn.functional.fractional_max_pool2d
        nn.functional.fractional_max_pool3d nn.functional.instance_norm nn.functional.rrelu normal normal.number_mean
        pca_lowrank rand_like randint randint_like randn randn_like svd_lowrank
    """,
    "sizes or branches depend on values": """
        allclose argwhere combinations corrcoef cov equal item linalg.lstsq linalg.lstsq.grad_oriented masked_select
        nn.functional.ctc_loss nn.functional.gaussian_nll_loss nonzero tensor_split unique
    """,
    "writes into its inputs": """
        _batch_norm_with_update cauchy exponential geometric log_normal native_batch_norm normal.in_place uniform
    """,
    "complex or other unknown dtypes": """
        cdouble cfloat complex fft.fft fft.fft2 fft.fftn fft.hfft fft.hfft2 fft.hfftn fft.ifft2 fft.ifftn fft.ihfft2
        fft.ihfftn fft.irfft fft.irfft2 fft.irfftn fft.rfft fft.rfft2 fft.rfftn hash_tensor linalg.eig linalg.eigvals polar
        stft view_as_complex
    """,
}
PARTLY = {
    "some samples are refused, for one of the reasons above": """
        linalg.matrix_rank linalg.matrix_rank.hermitian narrow nn.functional.avg_pool3d nn.functional.batch_norm
        nn.functional.feature_alpha_dropout.with_train nn.functional.max_pool1d nn.functional.max_pool2d
        nn.functional.multi_head_attention_forward
    """,
}
NOT_RUN = {
    "not for dense tensors on the CPU": """
        bfloat16 chalf fft.ifft fft.ihfft jiterator_2inputs_2outputs jiterator_4inputs_with_extra_args jiterator_binary
        jiterator_binary_return_by_ref jiterator_unary sparse.mm.reduce sparse.sampled_addmm to_sparse
    """,
    "results are uninitialised memory": """
        empty empty_like empty_permuted empty_strided new_empty new_empty_strided
    """,
}
# --- end of tables ---


class Samples(nn.Module):
    """Calls of operators; the tensors among their arguments are the inputs."""

    def __init__(self, calls: Sequence[tuple[Any, list[Any], Any]]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *tensors: torch.Tensor) -> dict[str, Any]:
        rest = iter(tensors)
        results = {}
        for number, (op, leaves, spec) in enumerate(self.calls):
            args, kwargs = pytree.tree_unflatten([next(rest) if isinstance(x, torch.Tensor) else x for x in leaves], spec)
            results[f"{number} {op.name}"] = op.op(*args, **kwargs)
        return results


def name_of(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


OPS = {name_of(op): op for op in op_db if torch.float32 in op.dtypes}


def samples_of(name: str, count: int | None) -> Iterator[tuple[Any, list[Any], Any]]:
    """The first samples of an operator (all without a count), as (operator, flat arguments, their structure)."""
    torch.manual_seed(0)
    for sample in islice(OPS[name].sample_inputs("cpu", torch.float32, requires_grad=False), count):
        yield OPS[name], *pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))


def disagreements(calls: Sequence[tuple[Any, list[Any], Any]]) -> dict[str, float]:
    """Import and run some calls as one program; the results whose error is more than is allowed."""
    tensors = tuple(leaf for _, leaves, _ in calls for leaf in leaves if isinstance(leaf, torch.Tensor))
    model = Samples(calls).eval()
    expected = reference(model, tensors)
    imported = import_model(model, tuple(t.clone() for t in tensors))
    inputs = imported.flatten_inputs(tensors)
    found = ratios(imported, inputs, interpret(imported.graph, inputs), expected)
    with torch.no_grad():
        results, _ = pytree.tree_flatten_with_path(model(*tensors))
    paths = [pytree.keystr(path) for path, leaf in results if isinstance(leaf, torch.Tensor)]
    return {path: ratio for path, ratio in zip(paths, found, strict=True) if not ratio <= TORCH_FACTOR}


def listed(table: dict[str, str]) -> set[str]:
    return {name for names in table.values() for name in names.split()}


SUPPORTED = sorted(set(OPS) - listed(REFUSED) - listed(PARTLY) - listed(NOT_RUN))
GROUPS = [SUPPORTED[start : start + GROUP] for start in range(0, len(SUPPORTED), GROUP)]


def test_the_tables_name_operators_once() -> None:
    tables = [listed(REFUSED), listed(PARTLY), listed(NOT_RUN)]
    assert set.union(*tables) <= set(OPS)
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert len(SUPPORTED) >= 400


@pytest.mark.parametrize("group", GROUPS, ids=[names[0] for names in GROUPS])
def test_samples(group: list[str]) -> None:
    assert not disagreements([call for name in group for call in samples_of(name, FAST_SAMPLES)])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SUPPORTED) | listed(PARTLY)))
def test_all_samples(name: str) -> None:
    for call in samples_of(name, None):
        try:
            assert not disagreements([call])
        except (ModelError, UnsupportedOpsError):
            assert name in listed(PARTLY)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(listed(REFUSED)))
def test_refusals(name: str) -> None:
    for call in samples_of(name, FAST_SAMPLES):
        with pytest.raises((ModelError, UnsupportedOpsError)):
            disagreements([call])
