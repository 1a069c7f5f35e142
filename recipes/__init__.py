"""One YAML per method, the small LightningModules they train, and the command that runs them."""

from groundwire.recipes.models import Classifier, ConvClassifier, SmallCNN, SmallResNet, SoftmaxRegression, TanhCNN

__all__ = ["Classifier", "ConvClassifier", "SmallCNN", "SmallResNet", "SoftmaxRegression", "TanhCNN"]
