# SPDX-License-Identifier: Apache-2.0
"""The torch model format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from taoq.network import Inputs
from taoq.plain import JsonMapping
from taoq.quantization.formats.base import ModelFormat
from taoq.quantization.formats.torch import measures, reach
from taoq.quantization.formats.torch.state import saved_size, state_digest
from taoq.quantization.types import LayerError


class TorchFormat:
    """Networks built by a task, with weights from a checkpoint."""

    name = "torch"

    def read(self, path: str, build: Callable[[str | None], nn.Module]) -> nn.Module:
        """Build the network and load a checkpoint into it."""
        return build(path)

    def output_names(self, path: str) -> Sequence[str]:
        """Return no names: a checkpoint has only weights."""
        return ()

    def is_quantized(self, model: nn.Module) -> bool:
        """Return False: loading a checkpoint refuses quantized payloads, which the backend of the artifact loads."""
        return False

    def properties(self, model: nn.Module, path: str) -> JsonMapping | None:
        """Return None: checkpoints have no metadata of taoq's export."""
        return None

    def prepare(self, model: nn.Module, path: str) -> nn.Module:
        """Return the network unchanged."""
        return model

    def size(self, model: nn.Module) -> int:
        """Return the size of the state dict as torch.save writes it, bytes."""
        return saved_size(model)

    def digest(self, model: nn.Module) -> str:
        """Return the SHA-256 of the state dict."""
        return state_digest(model)

    def unreached(self, model: nn.Module, inputs: Inputs, names: Sequence[str]) -> Mapping[str, str]:
        """Return the layers that images do not reach, with the reason."""
        return reach.unreached(model, inputs, names)

    def macs(self, model: nn.Module, inputs: Inputs) -> Mapping[str, int]:
        """Return the multiply-accumulates of each layer, for one sample."""
        return measures.macs(model, inputs)

    def layer_errors(
        self,
        reference: nn.Module,
        model: nn.Module,
        names: Sequence[str],
        batches: Iterable[Inputs],
        weight: Callable[[nn.Module, str], Tensor],
        *,
        device: str,
    ) -> Mapping[str, LayerError]:
        """Return the errors of quantized layers."""
        return measures.layer_errors(reference, model, names, batches, weight, device=device)

    def bias_shifts(
        self, reference: nn.Module, model: nn.Module, names: Sequence[str], batches: Iterable[Inputs], *, device: str
    ) -> Mapping[str, Tensor]:
        """Return the shifts of the mean outputs of quantized layers."""
        return measures.bias_shifts(reference, model, names, batches, device=device)


FORMAT: ModelFormat[nn.Module] = TorchFormat()
