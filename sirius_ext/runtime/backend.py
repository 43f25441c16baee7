"""Which backend computes a model's passes."""

from __future__ import annotations

from ..kernels.dispatch import is_cuda
from ..models.weights import Weights
from .cuda import CudaModel
from .model import Model


def model_of(weights: Weights) -> Model:
    """The model of the backend for the device that the weights are on."""
    return CudaModel(weights) if is_cuda(weights.device) else Model(weights)
