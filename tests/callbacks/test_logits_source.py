from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from groundwire.callbacks.information import CMIConstraint, LabelSmoothing, LogitsSource, SquaredErrorTeacher
from helpers.edge import CLASSES, FEATURES, Classifier, Rounds, fit, generator, loader, mlp


def batches(change: Callable[[Tensor, Tensor], Any], count: int = 2) -> Any:
    g = generator(1)
    made = []
    for _ in range(count):
        x, y = torch.randn(12, FEATURES, generator=g), torch.randint(0, CLASSES, (12,), generator=g)
        made.append(change(x, y))
    return Rounds(*made)


class Lenient(Classifier):
    """Makes a loss of anything, so that the callback is what complains."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0]).square().mean()


class Shaped(Lenient):
    """Gives outputs of another form."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__(mlp())
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.network(x))


BUILD = [lambda: CMIConstraint(), lambda: LabelSmoothing()]


@pytest.mark.parametrize("build", BUILD)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y.float()), r"expected class indices \[12\], got shape \(12,\) dtype torch.float32"),
        (lambda x, y: (x, F.one_hot(y, CLASSES).float()), "mixup or soft labels are not supported"),
        (lambda x, y: (x, y[:5]), r"expected class indices \[12\], got shape \(5,\)"),
        (lambda x, y: (x, y + 10), r"label 1\d but the logits have 3 columns"),
        (lambda x, y: (x, y - 3), r"label -\d but the logits have 3 columns"),
    ],
)
def test_labels_that_do_not_fit_are_refused(build: Any, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit("auto", Lenient(mlp()), batches(change), callbacks=[build()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z[:, :, None].expand(-1, -1, 4), r"got shape \(12, 3, 4\) dtype torch.float32; for segmentation"),
        (lambda z: z[:, 0], r"expected logits \[batch, classes\], got shape \(12,\)"),
        (lambda z: z[:, :1], "at least 2 classes; for one-logit binary heads pass binary=True"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit("auto", Shaped(change), batches(lambda x, y: (x, y)), callbacks=[CMIConstraint()])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_the_run_before_the_weights_change(bad: float) -> None:
    class Breaks(Lenient):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self(batch[0] if self.global_step < 2 else batch[0] * bad)
            return self.network[0].weight.square().mean()  # type: ignore[index]

    module = Breaks(mlp())
    with pytest.raises(RuntimeError, match="non-finite logits"):
        fit("auto", module, batches(lambda x, y: (x, y), 4), callbacks=[CMIConstraint()])


def test_a_term_that_overflows_is_named() -> None:
    class Overflows(LabelSmoothing):
        def total_loss(self, own_loss: Tensor, logits: Tensor, target: Tensor, batch: Any) -> Tensor:
            return own_loss * float("inf")

    with pytest.raises(RuntimeError, match="Overflows, step 0: the loss is not finite, although the logits are"):
        fit("auto", callbacks=[Overflows()])


def test_probabilities_are_warned_about_once_and_not_if_they_are_declared() -> None:
    def data() -> Any:
        return batches(lambda x, y: (x, y), 4)

    with pytest.warns(UserWarning, match="look like probabilities; pass from_probs=True") as caught:
        fit("auto", Shaped(lambda z: z.softmax(dim=1)), data(), callbacks=[CMIConstraint()])
    assert sum("look like probabilities" in str(w.message) for w in caught) == 1
    declared = CMIConstraint(beta=0.0, source=LogitsSource(from_probs=True))

    class Probabilities(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.network(x).softmax(dim=1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.nll_loss(self(batch[0]).log(), batch[1])

    of_probs, _, _ = fit("auto", Probabilities(mlp()), callbacks=[declared])
    of_logits, _, _ = fit("auto", callbacks=[CMIConstraint(beta=0.0)])
    torch.testing.assert_close(of_probs, of_logits, rtol=1e-3, atol=1e-5)


def test_manual_optimization_is_refused() -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match=r"Manual sets `automatic_optimization = False`"):
        fit("auto", Manual(), callbacks=[CMIConstraint()])


def test_a_step_without_a_loss_is_refused() -> None:
    class NoLoss(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"logits": self(batch[0])}

    with pytest.raises(MisconfigurationException, match="a dict with one under 'loss'"):
        fit("auto", NoLoss(mlp()), callbacks=[CMIConstraint()])


@pytest.mark.parametrize("wrap", [lambda z: {"logits": z}, lambda z: SimpleNamespace(logits=z)], ids=["dict", "object"])
def test_logits_inside_of_what_the_module_gives(wrap: Any) -> None:
    class Wrapped(Classifier):
        def forward(self, x: Tensor) -> Any:
            return wrap(self.network(x))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            out = self(batch[0])
            z = out["logits"] if isinstance(out, dict) else out.logits
            return {"loss": F.cross_entropy(z, batch[1]), "logits": z}

    expected, _, _ = fit("auto", callbacks=[CMIConstraint()])
    found, _, _ = fit("auto", Wrapped(mlp()), callbacks=[CMIConstraint()])
    assert torch.equal(found, expected)


def test_an_output_without_logits_is_refused() -> None:
    class Tuples(Classifier):
        def forward(self, x: Tensor) -> Any:
            return self.network(x), x

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0])[0], batch[1])

    with pytest.raises(MisconfigurationException, match=r"output of 'forward' is a tuple without `logits`"):
        fit("auto", Tuples(mlp()), callbacks=[CMIConstraint()])


class PastForward(Classifier):
    """Its step calls a submodule, not itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.network(batch[0]), batch[1])


def test_a_named_submodule_gives_the_logits() -> None:
    expected, _, _ = fit("auto", callbacks=[CMIConstraint()])
    for name in ("network", "network.2"):
        source = LogitsSource(name)
        found, _, _ = fit("auto", PastForward(mlp()), callbacks=[CMIConstraint(source=source)])
        assert torch.equal(found, expected)
    with pytest.raises(MisconfigurationException, match=r"PastForward\.forward was not called .* were: .*network"):
        fit("auto", PastForward(mlp()), callbacks=[CMIConstraint()])
    with pytest.raises(MisconfigurationException, match=r"has no submodule 'head'; it has network, network\.0"):
        fit("auto", PastForward(mlp()), callbacks=[CMIConstraint(source=LogitsSource("head"))])


class Twice(Classifier):
    """Two forwards: of the batch, and of its negative."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(x), y) + 0.0 * self(-x).sum()


class SmoothedByHand(Classifier):
    sign = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(self.sign * x), y, label_smoothing=0.1)


@pytest.mark.parametrize(("call", "sign"), [("first", 1.0), (0, 1.0), ("last", -1.0), (1, -1.0)])
def test_one_of_several_forwards_is_chosen(call: Any, sign: float) -> None:
    callback = LabelSmoothing(source=LogitsSource(call=call))
    found, _, _ = fit("auto", Twice(mlp()), callbacks=[callback], precision="64-true")
    by_hand = SmoothedByHand(mlp())
    by_hand.sign = sign
    torch.testing.assert_close(found, fit("auto", by_hand, precision="64-true")[0], rtol=1e-8, atol=1e-10)


def test_a_missing_forward_and_an_impossible_call_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="`call` is 2, but the step called forward 2 times"):
        fit("auto", Twice(mlp()), callbacks=[LabelSmoothing(source=LogitsSource(call=2))])
    for call in ("second", -1):
        with pytest.raises(ValueError, match="`call` must be 'first', 'last' or a number"):
            LogitsSource(call=call)  # type: ignore[arg-type]


class FromMapping(Classifier):
    keys = ("x", "y")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[self.keys[0]]), batch[self.keys[1]])


@pytest.mark.parametrize(
    "keys", [("x", "y"), ("image", "label"), ("pixel_values", "labels"), ("inputs", "targets"), ("input", "target")]
)
def test_labels_in_a_mapping(keys: tuple[str, str]) -> None:
    module = FromMapping(mlp())
    module.keys = keys
    data = Rounds(*({keys[0]: x, keys[1]: y} for x, y in loader()))
    found, _, _ = fit("auto", module, data, callbacks=[CMIConstraint()])
    expected, _, _ = fit("auto", callbacks=[CMIConstraint()])
    assert torch.equal(found, expected)


def test_an_unusual_batch_needs_and_takes_an_unpack() -> None:
    module = FromMapping(mlp())
    module.keys = ("pixels", "digit")
    data = Rounds(*({"pixels": x, "digit": y} for x, y in loader()))
    with pytest.raises(MisconfigurationException, match=r"a mapping with pixels, digit\. Say how"):
        fit("auto", module, data, callbacks=[CMIConstraint()])
    source = LogitsSource(unpack=lambda batch: (batch["pixels"], batch["digit"]))
    found, _, _ = fit("auto", module, data, callbacks=[CMIConstraint(source=source)])
    expected, _, _ = fit("auto", callbacks=[CMIConstraint()])
    assert torch.equal(found, expected)
    with pytest.raises(MisconfigurationException, match="a batch that is a Tensor"):
        LogitsSource().inputs_and_labels(torch.zeros(3))


def test_binary_and_segmentation_outputs() -> None:
    source = LogitsSource(binary=True)
    logits, labels = source.prepare(torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0], [0.0]]))
    torch.testing.assert_close(logits.softmax(dim=1)[:, 1], torch.tensor([2.0, -1.0]).sigmoid())
    assert labels.tolist() == [1, 0]
    z, y = torch.randn(2, 3, 4, 5, generator=generator()), torch.randint(0, 3, (2, 4, 5), generator=generator())
    logits, labels = LogitsSource(flatten=True).prepare(z, y)
    for row, (b, i, j) in {0: (0, 0, 0), 7: (0, 1, 2), 39: (1, 3, 4)}.items():
        assert torch.equal(logits[row], z[b, :, i, j])
        assert labels[row] == y[b, i, j]


def test_half_precision_logits_are_widened() -> None:
    logits, _ = LogitsSource().prepare(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 1]))
    assert logits.dtype == torch.float32


def test_soft_labels_of_another_shape_are_refused_where_soft_ones_are_welcome() -> None:
    data = batches(lambda x, y: (x, F.one_hot(y, CLASSES + 1).float()))
    with pytest.raises(ValueError, match=r"expected class indices|Soft labels must have"):
        fit("auto", Lenient(mlp()), data, callbacks=[SquaredErrorTeacher()])


def test_no_graph_outlives_a_step_that_failed() -> None:
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self(batch[0])
            raise ValueError("stop here")

    source = LogitsSource()
    with pytest.raises(ValueError, match="stop here"), source.open(module := Fails(mlp())) as calls:
        module.training_step(next(iter(loader())), 0)
    assert calls == []
    assert not module._forward_hooks


def test_a_source_of_pairs_keeps_all_options_but_how_pairs_are_found() -> None:
    options: dict[str, Any] = {"call": 1, "from_probs": True, "binary": True, "flatten": True}
    source = LogitsSource("head", unpack=lambda batch: (batch["x"], batch["y"]), **options)
    pairs = LogitsSource.of_pairs(source)
    assert {name: getattr(pairs, name) for name in options} == options
    assert pairs.submodule == "head"
    pair = torch.zeros(2), torch.ones(2)
    assert pairs.inputs_and_labels(pair) is pair
    assert set(vars(pairs)) == set(vars(source)), "a new option has to be kept, too"
