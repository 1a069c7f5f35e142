"""What forgetting is measured by: plain functions on tensors."""

from __future__ import annotations

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.func import vmap

from groundwire.callbacks.privacy.audit.functional import auc
from groundwire.callbacks.privacy.audit.scores import loss_scores
from groundwire.callbacks.unlearning.functional import counted, divergence
from groundwire.callbacks.unlearning.records import OutputLoss, default_output_loss

# ---------------------------------------------------------------- single records


def record_losses(outputs: Tensor, labels: Tensor, loss: OutputLoss | None = None) -> Tensor:
    """The loss of each record of a batch; it can be differentiated.

    Args:
        outputs: Logits ``(B, C)``, logits of sequences ``(B, T, V)``, or values ``(B, ...)``.
        labels: Class indices ``(B,)``, indices ``(B, T)``, or values that fit the outputs.
        loss: Of one record, from its outputs and its label; by default
            :func:`~groundwire.callbacks.unlearning.records.default_output_loss`.

    Returns:
        Shape ``(B,)``, at least float32; in nats for cross-entropy.

    Raises:
        ValueError: If the shapes do not fit, and no loss is given.

    Example:
        >>> record_losses(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor([1.3863, 1.3863])
        >>> record_losses(torch.ones(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor([2.])
    """
    if loss is None and not _fit(outputs, labels):
        raise ValueError(
            f"Outputs of shape {tuple(outputs.shape)} and {labels.dtype} labels of shape {tuple(labels.shape)} do not fit: "
            "class indices have the shape of the logits without their last dimension, and values that of the outputs. "
            "LogitsSource(unpack=...) picks others, and an `output_loss` takes any."
        )
    if outputs.dtype not in (torch.float32, torch.float64):
        outputs = outputs.float()
    if labels.is_floating_point():
        labels = labels.to(outputs.dtype)
    return vmap(loss or default_output_loss)(outputs, labels)


def record_accuracies(outputs: Tensor, labels: Tensor) -> Tensor | None:
    """Which records of a batch are classified right; of a sequence, the share of its tokens.

    Args:
        outputs: Logits ``(B, C)`` or ``(B, T, V)``.
        labels: Class indices ``(B,)`` or ``(B, T)``; -100 is left out, as in cross-entropy.

    Returns:
        Shape ``(B,)``, float64, in [0, 1], NaN where no position counts; None if the labels are no class indices that fit: nothing is right or wrong.

    Example:
        >>> record_accuracies(torch.eye(3), torch.tensor([0, 1, 0]))
        tensor([1., 1., 0.], dtype=torch.float64)
        >>> record_accuracies(torch.eye(3)[None], torch.tensor([[0, 0, -100]]))
        tensor([0.5000], dtype=torch.float64)
    """
    if labels.is_floating_point() or not _fit(outputs, labels):
        return None
    return _by_record((outputs.argmax(dim=-1) == labels).double(), labels)


def _fit(outputs: Tensor, labels: Tensor) -> bool:
    """Whether nothing would be taken for something else, or broadcast."""
    if labels.is_floating_point():
        return outputs.ndim >= 1 and len(outputs) == len(labels) and outputs.numel() == labels.numel()
    return outputs.ndim >= 2 and outputs.shape[:-1] == labels.shape


# ---------------------------------------------------------------- two models


def kl_divergences(reference: Tensor, logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """KL(reference || model) of the predicted distributions; of a sequence, the mean over its positions.

    Args:
        reference: Logits ``(B, C)`` or ``(B, T, V)`` of the model that never saw the forget set.
        logits: Those of the model, same shape.
        labels: Class indices ``(B,)`` or ``(B, T)``; positions whose label is -100 are left out. None counts all.

    Returns:
        Shape ``(B,)``, float64, in nats, at least 0; infinite where the model rules out what the reference does not, NaN
        where no position counts.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> kl_divergences(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([0.1201], dtype=torch.float64)
    """
    _same_shape(reference, logits)
    log_p, log_q = (z.double().log_softmax(dim=-1) for z in (reference, logits))
    return _by_record(divergence(log_p, log_q), labels).clamp_min(0.0)


def disagreements(reference: Tensor, logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Where two models name another class; of a sequence, the share of its positions.

    Args:
        reference: Logits ``(B, C)`` or ``(B, T, V)``.
        logits: Of the other model, same shape.
        labels: Class indices ``(B,)`` or ``(B, T)``; positions whose label is -100 are left out. None counts all.

    Returns:
        Shape ``(B,)``, float64, in [0, 1]; NaN where no position counts.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> disagreements(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 1.0]]))
        tensor([0., 1.], dtype=torch.float64)
    """
    _same_shape(reference, logits)
    return _by_record((reference.argmax(dim=-1) != logits.argmax(dim=-1)).double(), labels)


def output_distances(
    reference: Tensor, outputs: Tensor, are_logits: bool = True, labels: Tensor | None = None
) -> Tensor:
    """Euclidean distance of two models' outputs; of logits, that of the probabilities.

    Args:
        reference: Outputs ``(B, ...)``.
        outputs: Of the other model, same shape.
        are_logits: Whether they are logits, which are defined up to a constant only; of a sequence, the mean over its
            positions is taken.
        labels: Of logits, class indices ``(B,)`` or ``(B, T)``; positions whose label is -100 are left out. None counts
            all.

    Returns:
        Shape ``(B,)``, float64; NaN where no position counts.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> output_distances(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), are_logits=False)
        tensor([5.], dtype=torch.float64)
    """
    _same_shape(reference, outputs)
    if are_logits:
        difference = reference.double().softmax(dim=-1) - outputs.double().softmax(dim=-1)
        return _by_record(torch.linalg.vector_norm(difference, dim=-1), labels)
    difference = reference.double() - outputs.double()
    distances: Tensor = torch.linalg.vector_norm(difference.reshape(len(outputs), -1), dim=1)
    return distances


def weight_distance(module: nn.Module, reference: nn.Module) -> float:
    """Euclidean distance of two models' parameters.

    It tells something where the loss is convex; two trainings of a neural network are far apart anyway.

    Args:
        module: A model.
        reference: Another of the same architecture.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: If their parameters differ in names or shapes.

    Example:
        >>> first, second = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> _ = second.load_state_dict({name: value + 1 for name, value in first.state_dict().items()})
        >>> round(weight_distance(first, second), 5)  # three parameters
        1.73205
    """
    own, other = dict(module.named_parameters()), dict(reference.named_parameters())
    wrong = [
        f"`{name}` {list(own[name].shape) if name in own else 'missing'} and "
        f"{list(other[name].shape) if name in other else 'missing'}"
        for name in sorted(own.keys() | other.keys())
        if name not in own or name not in other or own[name].shape != other[name].shape
    ]
    if wrong:
        raise ValueError(
            f"The reference has another architecture than the model: {'; '.join(wrong[:3])}"
            f"{f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. Retrain the same model without the forget set."
        )
    squares = [
        (p.detach().cpu().double() - other[name].detach().cpu().double()).square().sum() for name, p in own.items()
    ]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _same_shape(reference: Tensor, outputs: Tensor) -> None:
    if reference.shape != outputs.shape:
        raise ValueError(
            f"The reference gives outputs of shape {tuple(reference.shape)}, and the model of {tuple(outputs.shape)}: "
            "compare two models of one architecture on the same batch."
        )


def _by_record(values: Tensor, labels: Tensor | None) -> Tensor:
    """The mean over each record's positions that count."""
    values = values.reshape(len(values), -1)
    if labels is None:
        return values.mean(dim=1)
    kept = counted(labels).reshape(len(labels), -1)
    return values.where(kept, 0.0).sum(dim=1) / kept.sum(dim=1)


# ---------------------------------------------------------------- membership


def mia_efficacy(
    retain_losses: Tensor, test_losses: Tensor, forget_losses: Tensor, cross_entropy: bool = True
) -> float:
    """The share of forget records that a membership attack takes for records the model never saw.

    The attack is a logistic regression on the model's confidence, fitted to tell retained records (members) from test
    records, each group with the same weight. Confidence is in [0, 1], so no single record decides, however large its loss:
    ``exp(-loss)``, the probability of the label, where the loss is a cross-entropy. Any other loss has a unit of its own
    and may be negative: there it is ``1 / (1 + exp((loss - m) / s))``, with the median ``m`` of the test records' losses
    and their median distance ``s`` from it.

    What to aim at is the value of a model retrained without the forget set, not 1: forget records that look like test
    records are taken for members as often as those are.

    Args:
        retain_losses: Of records the model was trained on and keeps, ``(r,)``.
        test_losses: Of records it never saw, ``(t,)``.
        forget_losses: Of the records to forget, ``(m,)``.
        cross_entropy: Whether losses are negative log-probabilities in nats.

    Returns:
        A share in [0, 1]; 0.5 where all confidences of the two groups are equal, so that the attack guesses.

    Raises:
        ValueError: If a group is empty or no vector, or a loss is not finite.

    Example:
        >>> seen, unseen = torch.tensor([0.1, 0.2, 0.1]), torch.tensor([2.0, 3.0])
        >>> mia_efficacy(seen, unseen, torch.tensor([0.1, 0.2, 2.5, 0.1]))
        0.25

    Reference:
        Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023, Appendix C.3. arXiv:2304.04934
    """
    groups = {"retain_losses": retain_losses, "test_losses": test_losses, "forget_losses": forget_losses}
    for name, losses in groups.items():
        _check_losses(name, losses)
    retain, test, forget = (losses.detach().cpu().double() for losses in groups.values())
    if cross_entropy:
        members, others, asked = (-retain).exp(), (-test).exp(), (-forget).exp()
    else:
        members, others, asked = _confidences(retain, test, forget)
    known = torch.cat([members, others])
    if bool((known == known[0]).all()):
        return 0.5
    scale = known.std()  # the penalty on the weight is then the same for confidences that are close together
    label = torch.cat([torch.ones(len(members)), torch.zeros(len(others))])
    attack = LogisticRegression(class_weight="balanced")
    attack.fit(((known - known.mean()) / scale)[:, None].numpy(), label.numpy())
    says_member = attack.predict(((asked - known.mean()) / scale)[:, None].numpy())
    return float((says_member == 0).mean())


def _confidences(retain: Tensor, test: Tensor, forget: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of losses with a unit of their own."""
    middle = test.median()
    candidates = [(test - middle).abs().median(), (retain.median() - middle).abs(), torch.cat([retain, test]).std()]
    unit = next((float(one) for one in candidates if one > 0), 1.0)
    confident = [torch.sigmoid((middle - losses) / unit) for losses in (retain, test, forget)]
    return confident[0], confident[1], confident[2]


def mia_auc(forget_losses: Tensor, test_losses: Tensor) -> float:
    """How well a small loss tells forget records from test records.

    Args:
        forget_losses: Of the records to forget, ``(m,)``.
        test_losses: Of records the model never saw, ``(t,)``.

    Returns:
        Area under the ROC curve, in [0, 1]: 0.5 is what random records should have after forgetting, above it they are
        still remembered, and below it they stand out by a loss that is too large. A forgotten class lies far below in the
        retrained model, too.

    Raises:
        ValueError: If a group is empty or no vector, or a loss is not finite.

    Example:
        >>> mia_auc(torch.tensor([0.1, 0.2]), torch.tensor([0.2, 0.3]))
        0.875
    """
    _check_losses("forget_losses", forget_losses)
    _check_losses("test_losses", test_losses)
    return auc(loss_scores(forget_losses), loss_scores(test_losses))


def _check_losses(name: str, losses: Tensor) -> None:
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"`{name}` must be a vector of at least one loss, got shape {tuple(losses.shape)}.")
    if not bool(torch.isfinite(losses).all()):
        raise ValueError(f"`{name}` has values that are not finite: the model has diverged.")
