"""The backbones, and copies of them: for inference (`deployed`), for attacks (`fused`), and without masked channels (`compact`)."""

from advmoe.models.build import MODELS, NoSuchForm, build_model
from advmoe.models.classifier import Classifier
from advmoe.models.deployed import deployed
from advmoe.models.fused import fused
from advmoe.models.masked import compact, start_scores

__all__ = ["MODELS", "Classifier", "NoSuchForm", "build_model", "compact", "deployed", "fused", "start_scores"]
