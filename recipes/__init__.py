"""One YAML per method, the small LightningModules they train, and the command that runs them."""

from groundwire.recipes.language import TinyTransformer
from groundwire.recipes.minilm import MiniLMClassifier
from groundwire.recipes.models import (
    MLP,
    Classifier,
    ConvClassifier,
    CrossEntropyModule,
    SmallCNN,
    SmallResNet,
    SoftmaxRegression,
    TanhCNN,
)

__all__ = [
    "MLP",
    "Classifier",
    "ConvClassifier",
    "CrossEntropyModule",
    "MiniLMClassifier",
    "SmallCNN",
    "SmallResNet",
    "SoftmaxRegression",
    "TanhCNN",
    "TinyTransformer",
]
