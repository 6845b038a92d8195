"""One token for each of a few sequences at the shapes that models have: three launches a layer, as for one sequence,
with the products of kernels/cuda/dots.cuh, eight sequences a block.

    step = FewStep(model, gpu, batch=8, state_dtype="int8")     # where FewStep.fits(model, gpu)
"""

from __future__ import annotations

from slimba.runtime.backends.cuda_codes import Codes
from slimba.runtime.backends.cuda_device import Gpu
from slimba.runtime.backends.cuda_lean import Dot, Lean, dot_of
from slimba.runtime.backends.cuda_mid import Mid
from slimba.runtime.backends.cuda_model import CudaModel
from slimba.runtime.backends.cuda_step import STORE, FusedStep, norm_groups
from slimba.runtime.backends.cuda_weights import float_bits

__all__ = ["FewStep"]


class FewStep(FusedStep):
    arithmetic = "float16"

    def __init__(self, model: CudaModel, gpu: Gpu, batch: int, state_dtype: str) -> None:
        super().__init__(model, gpu, batch, state_dtype)
        self._mid = Mid(gpu, batch, [model.head])

    @classmethod
    def fits(cls, model: CudaModel, gpu: Gpu, batch: int = 2) -> bool:
        spec = model.spec
        if spec.architecture != "mamba2" or batch < 2 or not gpu.bakes or not Mid.fits(model.head):
            return False
        every = products_of(model, gpu)
        return len(every) == 2 * len(model.layers) and len({lean.name for lean in every.values()}) <= 8

    def work(self, *, choose: bool, overlap: bool = True) -> None:
        """Launches one step. choose: the most likely ids become the next ids. overlap: by dependent launch."""
        self.layers(overlap)
        spec, model = self._model.spec, self._model
        source = [self.u.data_ptr(), spec.d_model, 0, 0, model.norm_f.data_ptr(), 1, float_bits(spec.norm_eps)]
        self._mid.norm(model.head, source, 1)
        out = [STORE, self.logits.data_ptr(), spec.vocab_size, *[0] * 7]
        self._mid.product(model.head, out, self._state(0))
        self.after(choose, overlap)

    def _lean_products(self) -> dict[int, Codes | Dot | Lean]:
        return products_of(self._model, self._gpu)


def products_of(model: CudaModel, gpu: Gpu) -> dict[int, Codes | Dot | Lean]:
    """The kernels of dots.cuh for in_proj and out_proj of the layers, by number; those that there are."""
    spec = model.spec
    late = bool(spec.gated_norm and spec.norm_before_gate)
    found: dict[int, Codes | Dot | Lean] = {}
    for i, layer in enumerate(model.layers):
        for k, name, groups, gated in (0, "in_proj", 1, False), (1, "out_proj", norm_groups(spec), late):
            dots = dot_of(layer.matrices[name], gpu.blocks, groups, gated, many=True)
            if dots is not None and dots.shared_bytes <= gpu.shared:
                found[2 * i + k] = dots
    return found
