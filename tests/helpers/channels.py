"""Checks that every channel and every projection must pass: subclass the tester in the part's own test file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from groundwire.plugins.channels import Channel, Projection
from groundwire.plugins.random import Key


def build_from_yaml(base: type, yaml: str) -> Any:
    """The part that ``yaml`` (with ``class_path`` and ``init_args``) names, built as the CLI builds it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "part")
    config: Namespace = parser.parse_string("part:\n" + "\n".join(f"  {line}" for line in yaml.strip().splitlines()))
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    return instantiate(config).part


class ChannelTester:
    """What holds for every channel that superposes symbols.

    A subclass sets ``yaml`` and writes ``make``; one whose channel has gains overrides ``noiseless``, one of complex
    symbols the dtypes.
    """

    yaml: str
    single, double = torch.float32, torch.float64
    refused = (torch.int64, torch.complex64, torch.bfloat16)
    uses_per_symbol = 1

    def make(self, noise_var: float) -> Channel:
        raise NotImplementedError

    def noiseless(self, x: Tensor, key: Key) -> Tensor:
        """What is heard without noise."""
        return x.sum(0)

    @staticmethod
    def key(num_devices: int, seed: int = 0, round: int = 0, name: str = "") -> Key:
        return Key(seed=seed, round=round, devices=tuple(range(num_devices)), name=name)

    @pytest.mark.parametrize("precision", ["single", "double"])
    @pytest.mark.parametrize(("num_devices", "s"), [(1, 1), (1, 7), (25, 100), (3, 4097)])
    def test_shape_dtype_and_input_untouched(self, num_devices: int, s: int, precision: str) -> None:
        dtype = getattr(self, precision)
        x = torch.randn(num_devices, s, dtype=dtype, generator=torch.Generator().manual_seed(1))
        before = x.clone()
        heard = self.make(noise_var=0.5)(x, self.key(num_devices))
        assert heard.symbols.shape == (s,)
        assert heard.symbols.dtype == dtype
        assert heard.channel_uses == s * self.uses_per_symbol
        assert heard.symbols.isfinite().all()
        assert torch.equal(x, before)

    def test_noiseless_channel_is_the_exact_sum(self) -> None:
        x = torch.randn(25, 1000, dtype=self.single, generator=torch.Generator().manual_seed(2))
        heard = self.make(noise_var=0.0)(x, self.key(25)).symbols
        assert torch.equal(heard, self.noiseless(x, self.key(25)))
        assert not torch.equal(heard, self.make(noise_var=1.0)(x, self.key(25)).symbols)

    def test_energy_is_what_each_device_sent(self) -> None:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(6, 501, dtype=self.single, generator=generator) * torch.logspace(-6, 6, 6)[:, None]
        energy = self.make(noise_var=1.0)(x, self.key(6)).energy
        expected = [math.fsum(v.real**2 + v.imag**2 for v in row) for row in x.tolist()]  # exact summation
        assert energy.dtype == torch.float64
        np.testing.assert_allclose(energy.numpy(), expected, rtol=1e-13)

    def test_silent_devices_cost_nothing(self) -> None:
        heard = self.make(noise_var=0.0)(torch.zeros(4, 9, dtype=self.single), self.key(4))
        assert not heard.symbols.any()
        assert not heard.energy.any()

    @pytest.mark.parametrize("noise_var", [0.01, 1.0, 7.0])
    @pytest.mark.parametrize("num_devices", [1, 25])
    def test_noise_variance_is_what_the_docstring_says(self, noise_var: float, num_devices: int) -> None:
        n = 100_000  # the noise is the receiver's: as much with 25 devices as with one
        x = torch.zeros(num_devices, n, dtype=self.double)
        noise = self.make(noise_var)(x, self.key(num_devices)).symbols
        measured, standard_error = float(noise.abs().square().mean()), math.sqrt(2 / n)
        assert abs(measured - noise_var) < 5 * noise_var * standard_error
        assert abs(measured - noise_var / 2) > 5 * noise_var * standard_error  # per complex symbol, halved
        assert abs(measured - noise_var * 2) > 5 * noise_var * standard_error
        assert float(noise.mean().abs()) < 5 * math.sqrt(noise_var / n)
        assert float((noise[1:] * noise[:-1].conj()).mean().abs()) < 5 * noise_var / math.sqrt(n)  # white

    def test_noise_does_not_depend_on_what_is_sent(self) -> None:
        channel, x = self.make(noise_var=1.0), torch.randn(5, 300, dtype=self.double)
        alone = channel(torch.zeros(1, 300, dtype=self.double), self.key(1)).symbols
        together = channel(x, self.key(5)).symbols - self.noiseless(x, self.key(5))
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)

    def test_order_of_devices_does_not_matter(self) -> None:
        generator = torch.Generator().manual_seed(4)
        x = torch.randint(-9, 10, (7, 200), generator=generator).to(self.double)
        order = torch.randperm(7, generator=generator)
        key, channel = self.key(7), self.make(noise_var=1.0)
        permuted = Key(seed=key.seed, round=key.round, devices=tuple(order.tolist()))
        straight, shuffled = channel(x, key), channel(x[order], permuted)
        torch.testing.assert_close(straight.symbols, shuffled.symbols, rtol=0, atol=1e-12)
        assert torch.equal(straight.energy[order], shuffled.energy)

    def test_key_decides_the_draw(self) -> None:
        channel, x = self.make(noise_var=1.0), torch.ones(2, 50, dtype=self.single)
        first = channel(x, self.key(2)).symbols
        torch.randn(3)  # draws of others do not matter
        assert torch.equal(channel(x, self.key(2)).symbols, first)
        assert torch.equal(self.make(noise_var=1.0)(x, self.key(2)).symbols, first)  # nothing to save or restore
        for other in (self.key(2, seed=1), self.key(2, round=1), self.key(2, name="layer")):
            assert not torch.isclose(channel(x, other).symbols, first).any()

    def test_has_no_state(self) -> None:
        assert not self.make(noise_var=1.0).state_dict()

    def test_reads_nothing_back_to_the_host(self) -> None:
        with torch.device("meta"):  # there, every read of a value raises
            x = torch.ones(3, 20, dtype=self.single)
        heard = self.make(noise_var=0.0)(x, self.key(3))
        assert heard.symbols.shape == (20,)
        assert heard.energy.shape == (3,)

    def test_builds_from_yaml(self) -> None:
        assert isinstance(build_from_yaml(Channel, self.yaml), type(self.make(noise_var=1.0)))

    @pytest.mark.parametrize("noise_var", [-1e-9, -1.0, math.nan, math.inf])
    def test_refuses_impossible_noise(self, noise_var: float) -> None:
        with pytest.raises(ValueError, match=r"`noise_var` is a variance.*>= 0.*got"):
            self.make(noise_var)

    def test_refuses_bad_symbols(self) -> None:
        channel = self.make(noise_var=1.0)
        with pytest.raises(ValueError, match=r"shape \(M, [sn]\).*got \(5,\)"):
            channel(torch.zeros(5, dtype=self.single), self.key(1))
        with pytest.raises(ValueError, match=r"[sn] >= 1 channel uses, got \(2, 0\)"):
            channel(torch.zeros(2, 0, dtype=self.single), self.key(2))
        with pytest.raises(ValueError, match="symbols of 3 devices, but the key names 2"):
            channel(torch.zeros(3, 5, dtype=self.single), self.key(2))
        names = f"{self.single} or {self.double}, got torch".replace("torch.", "", 2)
        for dtype in self.refused:
            with pytest.raises(TypeError, match=names):
                channel(torch.zeros(2, 5, dtype=dtype), self.key(2))


class ProjectionTester:
    """What holds for every projection; a subclass writes ``make``."""

    shapes = ((1, 1), (1, 5), (7, 7), (30, 61), (64, 200))

    def make(self, num_rows: int, numel: int, seed: int = 0) -> Projection:
        raise NotImplementedError

    @staticmethod
    def dense(projection: Projection) -> Tensor:
        """The matrix, column by column from its action on the unit vectors: shape ``(s, d)``."""
        return projection.mv(torch.eye(projection.numel, dtype=projection.dtype)).T

    def test_adjoint_identity(self) -> None:
        for s, d in self.shapes:
            generator = torch.Generator().manual_seed(d)
            projection = self.make(s, d).double()
            x = torch.randn(d, dtype=torch.float64, generator=generator)
            y = torch.randn(s, dtype=torch.float64, generator=generator)
            forward, backward = projection.mv(x) @ y, x @ projection.mtv(y)
            torch.testing.assert_close(forward, backward, rtol=1e-10, atol=1e-10)

    def test_columns_have_unit_norm_on_average(self) -> None:
        s, d = 200, 1000
        squares = torch.stack([self.dense(self.make(s, d, seed).double()).square().sum(0) for seed in range(4)])
        spread = math.sqrt(2 / s)  # of one column's squared norm, at most (dense Gaussian)
        assert abs(float(squares.mean()) - 1) < 5 * spread / math.sqrt(4 * d)
        assert float((squares - 1).abs().max()) < 6 * spread

    def test_truncated_is_the_first_rows_rescaled(self) -> None:
        whole = self.make(30, 61).double()
        for rows in (1, 17, 30):
            part = whole.truncated(rows)
            assert part.num_rows == rows
            torch.testing.assert_close(self.dense(part), self.dense(whole)[:rows] * math.sqrt(30 / rows))
            v = torch.randn(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
            torch.testing.assert_close(part.mv(part.least_squares(v)), v)
        assert whole.num_rows == 30

    def test_seed_decides_the_matrix(self) -> None:
        matrix = self.dense(self.make(30, 61, seed=3))
        torch.randn(3)  # draws of others do not matter
        assert torch.equal(self.dense(self.make(30, 61, seed=3)), matrix)
        assert not torch.equal(self.dense(self.make(30, 61, seed=4)), matrix)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_rows_of_a_batch_are_independent(self, dtype: torch.dtype) -> None:
        projection = self.make(30, 61).to(dtype)
        x = torch.randn(2, 3, 61, dtype=dtype, generator=torch.Generator().manual_seed(5))
        v = projection.mv(x)
        assert v.dtype == dtype
        assert v.shape == (2, 3, 30)
        for method, rows in ((projection.mv, x), (projection.mtv, v), (projection.least_squares, v)):
            for i in range(2):
                for j in range(3):
                    torch.testing.assert_close(method(rows)[i, j], method(rows[i, j]))

    def test_inputs_untouched(self) -> None:
        projection, x, v = self.make(30, 61), torch.ones(61), torch.ones(30)
        projection.mv(x), projection.mtv(v), projection.least_squares(v)
        assert bool((x == 1).all())
        assert bool((v == 1).all())

    def test_least_squares_is_numpys_pseudoinverse(self) -> None:
        for s, d in self.shapes:
            projection = self.make(s, d).double()
            v = torch.randn(3, s, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
            expected = np.linalg.lstsq(self.dense(projection).numpy(), v.T.numpy(), rcond=None)[0].T
            np.testing.assert_allclose(projection.least_squares(v).numpy(), expected, rtol=1e-7, atol=1e-9)

    def test_saves_nothing_and_comes_back_from_the_seed(self) -> None:
        projection = self.make(30, 61)
        projection.least_squares(torch.ones(30))  # fills what is cached
        assert not projection.state_dict()

    def test_moves_with_its_buffers(self) -> None:
        projection = self.make(30, 61)
        part = projection.truncated(20)
        projection.least_squares(torch.ones(30))
        projection.to("meta")
        assert projection.mv(torch.ones(61, device="meta")).device.type == "meta"
        assert part.mtv(torch.ones(20, device="meta")).shape == (61,)

    def test_refuses_impossible_shapes(self) -> None:
        for s, d in ((0, 5), (-1, 5), (6, 5)):
            with pytest.raises(ValueError, match=f"1 <= num_rows <= numel, got num_rows={s} and numel={d}"):
                self.make(s, d)
        projection = self.make(4, 9)
        for rows in (0, 5):
            with pytest.raises(ValueError, match=f"from 1 to 4 rows of this projection, got {rows}"):
                projection.truncated(rows)
        with pytest.raises(ValueError, match=r"shape \(\.\.\., 9\), with numel=9, got \(4,\)"):
            projection.mv(torch.zeros(4))
        for method in (projection.mtv, projection.least_squares):
            with pytest.raises(ValueError, match=r"shape \(\.\.\., 4\), with num_rows=4, got \(9,\)"):
                method(torch.zeros(9))
        with pytest.raises(TypeError, match=r"computes in torch.float32, got torch.float64: cast"):
            projection.mv(torch.zeros(9, dtype=torch.float64))
