"""
The discrete cosine transform, by matrix and by FFT, and the directions and radii that feature maps start from.

d size of a transform (the head size), m features.
"""

import math

import torch
import torch.nn.functional as F

# On a CPU the FFT beats the matrix from this size on, if there are rows enough to pay for its many calls. Measured on one
# thread of a Xeon, float32, torch 2.13: the time of the matrix over the FFT's at sizes 128, 256, 512, 1024 is .1, .1, .3, 1.2
# for one row, .5, 1.2, 2.1, 3.3 for 1024 rows and .5, 1.0, 1.3, 2.3 for 32768; for 1024 rows and their gradient .7, 1.1, 1.5
# at 256, 512, 1024. Size 512 is even near 50 rows. With a large prime factor (509) the FFT is no faster, and no slower.
FFT_FROM = 512
FFT_MIN_ROWS = 64
# rows per call: at 32768 of them pieces that stay in the cache take half the time
FFT_PIECE = 512


def dct_matrix(size: int) -> torch.Tensor:
    """Orthonormal DCT-II matrix C, (size, size) float64, row r the r-th frequency, as scipy.fft.dct(norm="ortho")."""
    n = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * n[:, None] * (n + 0.5)) * math.sqrt(2.0 / size)
    matrix[0] /= math.sqrt(2.0)
    return matrix


def dct_by_matrix(x: torch.Tensor, direction: str, matrix: torch.Tensor | None = None) -> torch.Tensor:
    """
    Orthonormal DCT-II (`forward`) or its inverse, DCT-III (`inverse`), of x (..., d) float32 or float64 along its last axis,
    in O(d^2). `matrix` is `dct_matrix(d)` in x's dtype, for callers who keep it.
    """
    matrix = dct_matrix(x.shape[-1]).to(x) if matrix is None else matrix
    return F.linear(x, matrix if direction == "forward" else matrix.T)


def dct_by_fft(x: torch.Tensor, direction: str) -> torch.Tensor:
    """
    The same as `dct_by_matrix` in O(d log d): one real FFT of length d of the even entries followed by the odd ones backwards
    (Makhoul 1980). Its output, turned by exp(-i pi k / 2d), is C_k - i C_(d-k).
    """
    d = x.shape[-1]
    half = (d + 1) // 2
    k = torch.arange(d // 2 + 1, device=x.device, dtype=x.dtype)
    angle = k * (math.pi / (2 * d))
    scale = torch.full_like(k, math.sqrt(2.0 / d))
    scale[0] = math.sqrt(1.0 / d)

    def forward(x):
        y = torch.fft.rfft(torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), dim=-1)).mul_(torch.polar(scale, -angle))
        return torch.cat((y.real, -y.imag[..., 1:half].flip(-1)), dim=-1)

    def inverse(x):
        y = torch.complex(x[..., : d // 2 + 1], -F.pad(x[..., half:].flip(-1), (1, 0))).mul_(torch.polar(1 / scale, angle))
        order = torch.fft.irfft(y, n=d)
        odd = F.pad(order[..., half:].flip(-1), (0, d % 2))
        return torch.stack((order[..., :half], odd), dim=-1).flatten(-2)[..., :d]

    transform = forward if direction == "forward" else inverse
    return torch.cat([transform(piece) for piece in x.reshape(-1, d).split(FFT_PIECE)]).view(x.shape)


def dct(x: torch.Tensor, direction: str, matrix: torch.Tensor | None = None) -> torch.Tensor:
    """The faster of `dct_by_matrix` and `dct_by_fft` for x's size and device, arguments as for the former."""
    size = x.shape[-1]
    # on other devices the FFT is not measured, and matrices are what they are best at
    if x.device.type == "cpu" and size >= FFT_FROM and x.numel() >= FFT_MIN_ROWS * size:
        return dct_by_fft(x, direction)
    return dct_by_matrix(x, direction, matrix)


def sign_flips(copies: int, size: int, seed: int) -> torch.Tensor:
    """(copies, size) float64: ones, then rows of random signs."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.ones(size, dtype=torch.float64)]
    for _ in range(1, copies):
        rows.append(torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1)
    return torch.stack(rows)


def frequency_matrix(feature_dim: int, head_dim: int, direction: str, seed: int) -> torch.Tensor:
    """
    Rows that `wdcf` projects on, (feature_dim, head_dim) float32: the DCT-II matrix (`forward`) or its transpose (`inverse`);
    beyond head_dim rows, further copies whose columns have random signs, so that they span new directions.
    """
    base = dct_matrix(head_dim)
    base = base if direction == "forward" else base.T
    flips = sign_flips(math.ceil(feature_dim / head_dim), head_dim, seed)
    return torch.cat([base * signs for signs in flips])[:feature_dim].float()


def orthogonal_rows(count: int, dim: int, seed: int) -> torch.Tensor:
    """Unit rows, (count, dim) float64, orthogonal within each block of dim of them: random rotations, one per block."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(math.ceil(count / dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        blocks.append(q * r.diagonal().sign())  # without the signs rotations would not be equally likely
    return torch.cat(blocks)[:count]


def low_discrepancy(count: int, dim: int, seed: int) -> torch.Tensor:
    """Scrambled Sobol points strictly inside the unit cube, (count, dim) float64."""
    points = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return points.clamp(1e-6, 1 - 1e-6)


def radii(uniform: torch.Tensor, head_dim: int, law: str) -> torch.Tensor:
    """
    Quantiles at `uniform` of the law of the radius: `normal` (the paper's, signed) or `chi` with head_dim degrees of freedom,
    the radius of a normal vector, for which the features are unbiased.
    """
    if law == "normal":
        return torch.special.ndtri(uniform)
    low, high = torch.zeros_like(uniform), torch.full_like(uniform, math.sqrt(head_dim) + 10.0)
    half_dim = torch.full_like(uniform, head_dim / 2)
    for _ in range(60):  # bisection: torch has the chi distribution function but not its inverse
        middle = (low + high) / 2
        below = torch.special.gammainc(half_dim, middle**2 / 2) < uniform
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
