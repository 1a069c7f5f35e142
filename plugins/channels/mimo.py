"""A server with many antennas: blind combining by the sum of the gains, and detection of single devices' symbols."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from groundwire.plugins.channels.fading import Fading
from groundwire.plugins.random import Key

_PURSUIT_BYTES = 64 * 2**20  # of the orthogonal directions that are held at a time
_RESIDUAL_FLOOR = 1e-10  # of a slot's energy: what float32 symbols leave of it is rounding


def antenna(purpose: str, index: int) -> str:
    """The purpose of an antenna's draws; the first antenna's are those of a server that has no other.

    Args:
        purpose: Of the draws of one antenna.
        index: Of the antenna, from 0.

    Returns:
        The purpose.

    Example:
        >>> antenna("uplink/fading", 0), antenna("uplink/fading", 3)
        ('uplink/fading', 'uplink/fading/antenna3')
    """
    return f"{purpose}/antenna{index}" if index else purpose


def combined_gains(
    fading: Fading,
    key: Key,
    num_antennas: int,
    uses: int,
    *,
    csi_error_var: float = 0.0,
    on: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """What each device's symbol is multiplied with when ``K`` antennas are combined by what is known of their sum gain.

    Antenna ``k`` hears ``y_k = sum_m h_(k,m) x_m + z_k``, and the server knows ``c_k = sum_m h_(k,m) + e_k`` with
    ``e_k ~ CN(0, csi_error_var)``. Combining, ``(1/K) sum_k conj(c_k) y_k = sum_m a_m x_m + z``, needs no more than
    ``a_m = (1/K) sum_k conj(c_k) h_(k,m)`` and the mean of ``|c_k|^2``, of which ``z`` has ``noise_var / K`` times the
    variance. Takes O(K M uses) time, nearly all of it draws, and O(M uses) memory.

    Args:
        fading: Law of the gains, independent over antennas.
        key: Names the devices, one a row, and the round. Draws are named by antenna and device.
        num_antennas: Antennas ``K``.
        uses: Complex channel uses.
        csi_error_var: Variance of the error in what is known of each sum gain.
        on: Where to draw.

    Returns:
        ``(a, power)``: shape ``(M, uses)``, complex64, and the mean of ``|c_k|^2``, shape ``(uses,)``, float32; with one
        column under block fading.

    Raises:
        ValueError: If ``num_antennas`` is below 1.

    Example:
        >>> from groundwire.plugins.channels import Rayleigh
        >>> a, power = combined_gains(Rayleigh(block=True), Key(seed=0, devices=(0, 1, 2)), num_antennas=1000, uses=7)
        >>> a.shape, bool((a - 1).abs().max() < 0.2), round(power.item())
        (torch.Size([3, 1]), True, 3)
    """
    check_antennas(num_antennas)
    columns = 1 if fading.block else uses
    gains = torch.zeros(len(key), columns, dtype=torch.complex64, device=on)
    power = torch.zeros(columns, device=on)
    for k in range(num_antennas):
        h = fading.gains(key, uses, on=on, purpose=antenna("uplink/fading", k))
        known = h.sum(0)
        if csi_error_var:
            known += _noise(key, antenna("uplink/csi_error", k), (columns,), csi_error_var, on)
        gains += known.conj() * h
        power += known.abs().square()
        del h  # before the next is drawn
    return gains / num_antennas, power / num_antennas


@dataclass(frozen=True, eq=False, kw_only=True)
class Moments:
    """The first two moments of complex numbers.

    Args:
        mean: ``E[z]``.
        variance: ``E|z - E[z]|^2``.
        pseudo_variance: ``E[(z - E[z])^2]``: 0 if real and imaginary part are uncorrelated and vary alike.
    """

    mean: Tensor
    variance: Tensor
    pseudo_variance: Tensor

    def draw(self, generator: torch.Generator) -> Tensor:
        """Independent normal numbers of these moments.

        Args:
            generator: Of the draws.

        Returns:
            Numbers of the shape and dtype of :attr:`mean`.
        """
        size = self.pseudo_variance.abs()
        axis = torch.where(size > 0, self.pseudo_variance / size.clamp_min(torch.finfo(size.dtype).tiny), 1).sqrt()
        normal = torch.randn(2, *size.shape, generator=generator, dtype=size.dtype, device=size.device)
        along = ((self.variance + size) / 2).sqrt() * normal[0]
        across = ((self.variance - size).clamp_min(0) / 2).sqrt() * normal[1]
        return self.mean + axis * torch.complex(along, across)


def blind_moments(
    symbols: Tensor,
    mean_squares: Tensor,
    *,
    num_antennas: int,
    norm: float,
    noise_var: float = 0.0,
    csi_error_var: float = 0.0,
) -> Moments:
    """Moments of ``(1/K) sum_k conj(c_k) y_k / norm`` under Rayleigh fading, independent over antennas and devices.

    With ``D = norm``, ``s_m^2`` the mean squares and ``x_m`` the symbols, the mean is ``sum_m s_m^2 x_m / D``, the
    variance ``(sum_m s_m^2 + csi_error_var) (sum_m s_m^2 |x_m|^2 + noise_var) / (K D^2)``, and the pseudo-variance the
    square of the mean over ``K``: the error is largest along the mean. They are exact for every ``K``. With ``M`` alike
    devices and ``D = M s^2`` the variance is ``P / K`` for ``P = (1/M) sum_m |x_m|^2``, and what noise and CSI add.

    Args:
        symbols: As they are sent, shape ``(M, n)``, complex.
        mean_squares: Mean of ``|h_m|^2`` of each device, shape ``(M,)``.
        num_antennas: Antennas ``K``.
        norm: What the server divides by, ``D``.
        noise_var: Noise variance per complex channel use at one antenna.
        csi_error_var: Variance of the error in what is known of each antenna's sum gain.

    Returns:
        Moments, each of shape ``(n,)``.

    Raises:
        ValueError: If ``num_antennas`` is below 1.

    Reference:
        The estimate is that of Mohammadi Amiri, Duman, Gündüz, Kulkarni, Poor, "Blind Federated Edge Learning", IEEE
        Trans. Wireless Commun. 20(8), 2021. arXiv:2010.10030. Its moments are derived here, by Isserlis' theorem.

    Example:
        >>> m = blind_moments(torch.ones(5, 1, dtype=torch.complex64), torch.ones(5), num_antennas=10, norm=5.0)
        >>> m.mean.item(), round(m.variance.item(), 3), round(m.pseudo_variance.real.item(), 3)
        ((1+0j), 0.1, 0.1)
    """
    check_antennas(num_antennas)
    squares = mean_squares.to(symbols.real.dtype)
    mean = (squares.unsqueeze(1) * symbols).sum(0) / norm
    heard = squares @ symbols.abs().square() + noise_var
    variance = (squares.sum() + csi_error_var) * heard / (num_antennas * norm**2)
    return Moments(mean=mean, variance=variance, pseudo_variance=mean.square() / num_antennas)


# ---------------------------------------------------------------- single devices' symbols


@dataclass(frozen=True, eq=False, kw_only=True)
class Detection:
    """What a server with several antennas makes of the symbols that devices sent at once.

    Args:
        symbols: Estimates, shape ``(M, n)``, one row a device and one column a slot.
        support_size: Devices that were found active in each slot, shape ``(n,)``, int64.
        overloaded: Slots in which the residual did not come down to that of noise, shape ``(n,)``, bool.
    """

    symbols: Tensor
    support_size: Tensor
    overloaded: Tensor


def greedy_lmmse(
    y: Tensor,
    channel: Tensor,
    *,
    noise_var: float,
    symbol_var: float,
    slack: float = 0.2,
    max_support: int | None = None,
) -> Detection:
    """Find, slot by slot, the few devices that sent, and estimate their symbols by LMMSE.

    In each slot the device whose normalised gains match the residual best joins the support, the symbols of all its
    devices are estimated anew, and the slot ends when its residual is at most ``1 + slack`` times what a true support
    would leave on average, ``noise_var (N_r - |S|) + noise_var tr(R (H_S^H H_S + R)^-1)`` with ``R = noise_var /
    symbol_var``. Slots with nothing but noise have no devices. All slots go on together. A further device adds one
    direction to an orthogonal basis, which also brings estimate, residual and trace up to date: O(N_r M) operations a slot
    to begin with and O(M J) for its ``J``-th device, in double precision.

    Args:
        y: What the antennas received, shape ``(N_r, n)``, complex.
        channel: Gains ``H``, shape ``(N_r, M)``, complex, the same in all slots.
        noise_var: Noise variance per complex symbol at one antenna.
        symbol_var: Mean of ``|x|^2`` over symbols of active devices.
        slack: How far above its mean the residual may end; more finds fewer weak symbols, and fewer that are noise.
        max_support: Most devices in a slot; by default and at most ``min(M, N_r)``.

    Returns:
        Estimates of the dtype of ``y``. In a slot that is overloaded they are those of the largest support.

    Raises:
        ValueError: If shapes do not fit, or a setting is out of range.
        TypeError: If ``y`` or ``channel`` is not complex.

    Reference:
        After Jeon, Mohammadi Amiri, Li, Poor, "A Compressive Sensing Approach for Federated Learning over Massive MIMO
        Communication Systems", IEEE Trans. Wireless Commun. 20(3), 2021. arXiv:2003.08059 (the order of the steps and
        the threshold's exact form are ours)

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> h = torch.randn(8, 20, dtype=torch.complex64, generator=g)
        >>> x = torch.zeros(20, 1, dtype=torch.complex64)
        >>> x[3], x[11] = 1, -1j
        >>> found = greedy_lmmse(h @ x, h, noise_var=1e-6, symbol_var=1.0)
        >>> found.support_size.item(), found.symbols.abs().flatten().nonzero().flatten().tolist()
        (2, [3, 11])
    """
    _check_reception(y, channel, noise_var, symbol_var)
    if not 0 <= slack < math.inf:
        raise ValueError(f"`slack`, how far above its mean the residual may end, must be finite and >= 0, got {slack}.")
    num_antennas, num_devices = channel.shape
    largest = min(num_antennas, num_devices)
    if max_support is not None and not 1 <= max_support <= largest:
        raise ValueError(f"`max_support` must be from 1 to min(M, N_r) = {largest}, got {max_support}.")
    largest = largest if max_support is None else max_support
    h, received = channel.to(torch.complex128), y.to(torch.complex128)
    matched, energy = (h.mH @ received).T.contiguous(), received.abs().square().sum(0)
    gram = h.mH @ h
    setting = _Pursuit(
        gram=gram,
        ridge=noise_var / symbol_var,
        noise_var=noise_var,
        slack=slack,
        num_antennas=num_antennas,
        largest=largest,
    )
    at_a_time = max(1, _PURSUIT_BYTES // (32 * num_devices * largest))
    parts = [
        setting.run(matched[start : start + at_a_time], energy[start : start + at_a_time])
        for start in range(0, len(matched), at_a_time)
    ]
    symbols, sizes, overloaded = (torch.cat(column) for column in zip(*parts, strict=True))
    return Detection(symbols=symbols.T.to(y.dtype), support_size=sizes, overloaded=overloaded)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Pursuit:
    """Orthogonal matching pursuit with the columns ``[h_m; sqrt(ridge) e_m]``, whose least squares are LMMSE.

    With the orthonormal directions ``q_j`` that the chosen columns span, each row of the basis holds the products of all
    columns with ``q_j``, and after them ``q_j`` as a combination of columns.
    """

    gram: Tensor
    ridge: float
    noise_var: float
    slack: float
    num_antennas: int
    largest: int

    def run(self, matched: Tensor, energy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Estimates ``(n, M)``, support sizes ``(n,)`` and overloaded slots ``(n,)`` from ``y^H``-products and ``|y|^2``."""
        num_devices = len(self.gram)
        norms = self.gram.diagonal().real
        identity = torch.eye(num_devices, dtype=self.gram.dtype, device=self.gram.device)
        columns = self.gram + self.ridge * identity
        seeds = torch.cat([columns.T, identity], dim=1)  # row m: products of all columns with the m-th, and itself
        symbols, sizes = torch.zeros_like(matched), torch.zeros(len(matched), dtype=torch.int64, device=matched.device)
        floor = _RESIDUAL_FLOOR * energy
        overloaded = energy > (1 + self.slack) * self.noise_var * self.num_antennas + floor
        running = overloaded.nonzero().flatten()
        left, now, unexplained = matched[running], symbols[running], energy[running]
        trace, chosen = torch.zeros_like(unexplained), torch.zeros_like(left, dtype=torch.bool)
        basis = seeds.new_zeros(len(running), 0, 2 * num_devices)
        for size in range(1, self.largest + 1):
            if not len(running):
                break
            score = (left.abs().square() / norms).masked_fill(chosen, -1)
            pick = score.argmax(dim=1, keepdim=True)
            chosen = chosen.scatter(1, pick, value=True)
            overlap = basis.gather(2, pick.unsqueeze(1).expand(-1, size - 1, 1)).conj()  # (slots, size - 1, 1)
            row = seeds[pick.squeeze(1)] - (overlap.mT @ basis).squeeze(1)
            rest = columns.diagonal().real[pick] - overlap.abs().square().sum(1)
            row = row / rest.clamp_min(torch.finfo(rest.dtype).eps * norms.max()).sqrt()
            products, mixture = row[:, :num_devices], row[:, num_devices:]
            along = left.gather(1, pick) * mixture.gather(1, pick).real
            left = left - along * products
            now = now + along * mixture
            unexplained = unexplained - along.abs().square().squeeze(1)
            trace = trace + mixture.abs().square().sum(1)
            symbols[running], sizes[running] = now, size

            residual = unexplained - self.ridge * now.abs().square().sum(1)
            expected = self.noise_var * (self.num_antennas - size + self.ridge * trace)
            goes_on = residual > (1 + self.slack) * expected + floor[running]
            overloaded[running] = goes_on
            basis = torch.cat([basis, row.unsqueeze(1)], dim=1)
            stay = goes_on.nonzero().flatten()  # one look at the device instead of one a tensor
            running, left, now, unexplained, trace, chosen, basis = (
                part.index_select(0, stay) for part in (running, left, now, unexplained, trace, chosen, basis)
            )
        return symbols, sizes, overloaded


def residual_energy(channel: Tensor, *, noise_var: float, symbol_var: float) -> float:
    """Mean of ``|y - H x|^2`` where ``x`` is the LMMSE estimate of what all devices of ``channel`` sent.

    Args:
        channel: Gains of the devices that sent, shape ``(N_r, J)``, complex.
        noise_var: Noise variance per complex symbol at one antenna.
        symbol_var: Mean of ``|x|^2``.

    Returns:
        ``noise_var (N_r - J) + sum_i noise_var^2 / (noise_var + symbol_var l_i)``, with the eigenvalues ``l_i`` of
        ``H^H H``.

    Example:
        >>> round(residual_energy(torch.eye(3, 2, dtype=torch.complex64), noise_var=1.0, symbol_var=1.0), 6)
        2.0
    """
    h = channel.to(torch.complex128)
    eigenvalues = torch.linalg.eigvalsh(h.mH @ h)
    left: Tensor = noise_var**2 / (noise_var + symbol_var * eigenvalues)
    return noise_var * (channel.shape[0] - channel.shape[1]) + float(left.sum())


def lmmse(y: Tensor, channel: Tensor, *, noise_var: float, symbol_var: float) -> Tensor:
    """Linear minimum mean square error estimates of all devices' symbols.

    Args:
        y: What the antennas received, shape ``(N_r, n)``, complex.
        channel: Gains ``H``, shape ``(N_r, M)``, complex.
        noise_var: Noise variance per complex symbol at one antenna; 0 gives the shortest of the least-squares solutions.
        symbol_var: Mean of ``|x|^2`` over all symbols, those of silent devices included.

    Returns:
        ``(H^H H + noise_var / symbol_var I)^-1 H^H y``, shape ``(M, n)``, computed in double precision.

    Raises:
        ValueError: If shapes do not fit, or a variance is out of range.
        TypeError: If ``y`` or ``channel`` is not complex.

    Example:
        >>> lmmse(torch.ones(2, 1, dtype=torch.complex64), torch.eye(2, dtype=torch.complex64), noise_var=1.0, symbol_var=1.0)
        tensor([[0.5000+0.j],
                [0.5000+0.j]])
    """
    _check_reception(y, channel, noise_var, symbol_var)
    h, received = channel.to(torch.complex128), y.to(torch.complex128)
    if noise_var == 0:
        shortest: Tensor = torch.linalg.pinv(h) @ received
        return shortest.to(y.dtype)
    ridge = noise_var / symbol_var * torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    estimate: Tensor = torch.linalg.solve(h.mH @ h + ridge, h.mH @ received)
    return estimate.to(y.dtype)


def zero_forcing(y: Tensor, channel: Tensor) -> Tensor:
    """Least-squares estimates of all devices' symbols, each free of the others.

    Args:
        y: As in :func:`lmmse`.
        channel: As there; no more devices than antennas.

    Returns:
        ``(H^H H)^-1 H^H y``, shape ``(M, n)``.

    Raises:
        ValueError: If there are more devices than antennas, or shapes do not fit.
        TypeError: If ``y`` or ``channel`` is not complex.

    Example:
        >>> zero_forcing(torch.ones(2, 1, dtype=torch.complex64), 2 * torch.eye(2, dtype=torch.complex64))
        tensor([[0.5000+0.j],
                [0.5000+0.j]])
    """
    _check_reception(y, channel, 0.0, 1.0)
    num_antennas, num_devices = channel.shape
    if num_devices > num_antennas:
        raise ValueError(
            f"Zero forcing needs M <= N_r, got M={num_devices} devices at N_r={num_antennas} antennas. Use lmmse, give the "
            "server more antennas, or schedule fewer devices."
        )
    return lmmse(y, channel, noise_var=0.0, symbol_var=1.0)


def maximum_ratio(y: Tensor, channel: Tensor) -> Tensor:
    """Maximum ratio combining: each device's symbols from its own gains, as if it had sent alone.

    Args:
        y: As in :func:`lmmse`.
        channel: As there.

    Returns:
        ``h_m^H y / |h_m|^2``, shape ``(M, n)``.

    Raises:
        ValueError: If shapes do not fit.
        TypeError: If ``y`` or ``channel`` is not complex.

    Example:
        >>> maximum_ratio(torch.ones(2, 1, dtype=torch.complex64), torch.ones(2, 1, dtype=torch.complex64))
        tensor([[1.+0.j]])
    """
    _check_reception(y, channel, 0.0, 1.0)
    h = channel.to(y.dtype)
    return h.mH @ y / h.abs().square().sum(0).unsqueeze(1)


def check_antennas(num_antennas: int) -> int:
    """Return the number of antennas, or refuse it.

    Args:
        num_antennas: Antennas of the server.

    Returns:
        The number.

    Raises:
        ValueError: If it is below 1.
    """
    if num_antennas < 1:
        raise ValueError(f"`num_antennas` must be at least 1, got {num_antennas}.")
    return num_antennas


def receiver_noise(
    key: Key, num_antennas: int, uses: int, noise_var: float, *, on: torch.device | str = "cpu"
) -> Tensor:
    """Noise at all antennas in a round, ``CN(0, noise_var)``.

    Args:
        key: Of the round.
        num_antennas: Antennas ``N_r``.
        uses: Complex channel uses ``n``.
        noise_var: Variance per complex symbol.
        on: Where to draw.

    Returns:
        Shape ``(N_r, n)``, complex64.

    Example:
        >>> receiver_noise(Key(seed=0), 2, 3, noise_var=1.0).shape
        torch.Size([2, 3])
    """
    return _noise(key, "uplink/noise", (num_antennas, uses), noise_var, on)


def _noise(key: Key, purpose: str, shape: tuple[int, ...], variance: float, on: torch.device | str) -> Tensor:
    z = torch.randn(*shape, generator=key.shared(purpose, on=on), dtype=torch.complex64, device=on)
    return z * math.sqrt(variance)


def _check_reception(y: Tensor, channel: Tensor, noise_var: float, symbol_var: float) -> None:
    if not channel.is_complex() or channel.ndim != 2 or not channel.numel():
        error = ValueError if channel.is_complex() else TypeError
        raise error(
            f"The channel matrix must be complex of shape [N_r, M], got {channel.dtype} of shape {tuple(channel.shape)}."
        )
    if not y.is_complex():
        raise TypeError(f"Received symbols must be complex, got {y.dtype}.")
    if y.ndim != 2 or len(y) != len(channel) or not y.shape[1]:
        raise ValueError(
            f"Received symbols must have shape [N_r, n] with N_r={len(channel)} antennas and n >= 1 slots, got "
            f"{tuple(y.shape)}."
        )
    if not 0 <= noise_var < math.inf:
        raise ValueError(f"`noise_var` must be finite and >= 0, got {noise_var}.")
    if not 0 < symbol_var < math.inf:
        raise ValueError(f"`symbol_var`, the mean of |x|^2, must be finite and > 0, got {symbol_var}.")
