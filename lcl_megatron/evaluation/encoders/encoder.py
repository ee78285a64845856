"""An image encoder: pixels in, patch features out, whichever library it came from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lcl_megatron.evaluation.encoders.preprocessing import Preprocessing

PatchFeatures = Callable[[Tensor], Tensor]
"""Normalised pixels (N, 3, S, S) float32 -> patch tokens (N, P, C) behind the last norm, without prefix tokens."""


NUMBERS = ("num_heads", "eps", "approximate")
"""Attributes of layers that change what they compute while the weights stay the same."""
TRAINING_ONLY = frozenset(("DropPath", "Dropout", "PatchDropout", "Identity"))
"""Layers that do nothing in evaluation; libraries leave them out or put another in their place as they like."""


class EncoderError(ValueError):
    """An encoder that cannot be loaded or has no patch features; the message says what to do."""


class ImageEncoder(nn.Module):
    """An encoder of a stock library in one shape.

    Trains when its parameters require gradients; drop-path acts in training mode only, as the library does it.
    """

    def __init__(self, name: str, model: nn.Module, patch_features: PatchFeatures, preprocessing: Preprocessing):
        """Wrap a model, after one image of zeros has shown what it returns.

        Args:
            name: how it is called in tables.
            model: holds the parameters; registered as ``model``.
            patch_features: calls ``model``.
            preprocessing: its library's evaluation transform.

        Raises:
            EncoderError: the model returns no patch tokens.
        """
        super().__init__()
        self.name = name
        self.model = model
        self.preprocessing = preprocessing
        self._patch_features = patch_features
        model.eval()
        with torch.no_grad():
            probe = patch_features(torch.zeros(1, 3, preprocessing.size, preprocessing.size))
        if probe.ndim != 3 or probe.shape[1] < 1:
            raise EncoderError(
                f"{name}: {type(model).__name__} returns features of shape {tuple(probe.shape)}, not patch tokens "
                "(N, P, C); transfer tasks pool over patches: choose a vision transformer"
            )
        self.num_patches, self.width = probe.shape[1:]

    @property
    def image_size(self) -> int:
        """Side of the images it reads, in pixels."""
        return self.preprocessing.size

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    def forward(self, pixels: Tensor) -> Tensor:
        """Return patch features.

        Args:
            pixels: (N, 3, S, S) uint8 RGB, on the encoder's device.

        Returns:
            (N, P, C), behind the last norm, row by row over the image; without class or register tokens.
        """
        return self._patch_features(self.preprocessing.normalize(pixels))

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with any weight, with the preprocessing, and with what layers compute.

        The last is told by their classes, such as QuickGELU's instead of GELU's, and by ``NUMBERS`` of theirs: the same
        weights are often at hand with either activation. What acts in training only is left out.
        """
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.preprocessing)).encode())
        for name, module in self.model.named_modules():
            kind = type(module).__qualname__
            if kind not in TRAINING_ONLY:
                numbers = [getattr(module, number, None) for number in NUMBERS]
                digest.update(f"{name} {kind} {numbers}\n".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, object]:
        """Return what results record of an encoder, for JSON."""
        return {
            "name": self.name,
            "class": f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            "fingerprint": self.fingerprint(),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "image_size": self.image_size,
            "patches": self.num_patches,
            "width": self.width,
            "preprocessing": dataclasses.asdict(self.preprocessing),
        }


def add_drop_path(branches: list[list[nn.Module]], rate: float) -> None:
    """Drop residual branches in training mode, per image, with probabilities from 0 in the first layer to ``rate``.

    For libraries without drop-path of their own: each branch's output is multiplied by 0 or 1 / (1 - p). Huang et
    al., Deep Networks with Stochastic Depth, 2016 (arXiv 1603.09382).

    Args:
        branches: for each layer, the modules whose outputs are added to the residual stream; a module may return a
            tuple, whose first entry is meant. Outputs are (N, ...).
        rate: of the last layer.
    """
    for layer, modules in enumerate(branches):
        probability = rate * layer / max(1, len(branches) - 1)
        for module in modules:
            module.register_forward_hook(_dropping(probability))


def _dropping(probability: float) -> Callable[[nn.Module, object, object], object]:
    def hook(module: nn.Module, _inputs: object, output: object) -> object:
        if not module.training or probability == 0:
            return output
        branch = output[0] if isinstance(output, tuple) else output
        assert isinstance(branch, Tensor)
        ones = branch.new_ones((branch.shape[0], *[1] * (branch.ndim - 1)))
        dropped = branch * nn.functional.dropout(ones, probability)
        return (dropped, *output[1:]) if isinstance(output, tuple) else dropped

    return hook
