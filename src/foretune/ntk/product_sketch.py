"""Sketches of the gradients of weights from what they are products of: no gradient of a weight is ever formed.

The gradient of a linear module's weight and bias is G = Σ_t g_t h̃_tᵀ with h̃_t = (h_t, 1), d_out × (d_in + 1) numbers.
Number (i, j) goes with the sign s_i r_j to place (p_i + q_j) mod w of the sketch, so that the sketch of an outer
product is the circular convolution of two vectors of length w (Pagh 2013; Pham and Pagh 2013):

    φ̂ = Σ_t (S g_t) ⊛ (R h̃_t) = F⁻¹ Σ_t F(S g_t) ⊙ F(R h̃_t),      (S g)_b = Σ_{i: p_i = b} s_i g_i,   R alike

with the discrete Fourier transform F of length w. The signs and p_i are random. q_j is j, turned by a random number for
each w of them, so that R lets no two of the first w numbers meet. E[K̂] = K, and with K_m the kernel of one module

    Var[K̂_ij] ≤ (K_ii K_jj + K_ij² + Σ_m c_m (K_m,ii K_m,jj + K_m,ij²)) / w · (1 + o(1))

where c_m = 1 for d_in < w, else 2: two rows of G that meet do so with all of their numbers. A sketch that draws a place
and a sign for every number (`foretune.ntk.feature_sketch`) has c_m = 0, and G to form and to go through.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foretune.ntk.feature_sketch import signs

CHUNK = {"cpu": 2**17}  # numbers of a transform that are made at once; what the cache of a core holds
_LARGE = 2**24


@dataclass(frozen=True)
class ProductSketch:
    """A sketch of outer products.

    Attributes:
        width: Numbers w.
        places: p, one for each of d_out.
        signs: s, alike.
        turns: What each w of the places q are turned by.
        signs_in: r, one for each of d_in (+ 1 for a bias).
    """

    width: int
    places: Int[Tensor, " d_out"]
    signs: Float[Tensor, " d_out"]
    turns: Sequence[int]
    signs_in: Float[Tensor, " d_in"]

    def places_in(self) -> Int[Tensor, " d_in"]:
        """Places q of the numbers of an input."""
        j = torch.arange(len(self.signs_in))
        return (j + torch.tensor(self.turns)[j // self.width]) % self.width

    def of(self, g: Float[Tensor, "n t d_out"], h: Float[Tensor, "n t d_in"]) -> Float[Tensor, "n width"]:
        """Sketch Σ_t g_t h_tᵀ of n examples.

        Args:
            g: Gradients.
            h: Inputs, with a 1 after them for a bias.

        Returns:
            n × w numbers.
        """
        n, positions = g.shape[:2]
        total = torch.zeros(n, self.width // 2 + 1, dtype=g.dtype.to_complex(), device=g.device)
        step = max(1, CHUNK.get(g.device.type, _LARGE) // max(1, n * self.width))
        places, places_in = self.places.to(g.device), self.places_in().to(g.device)
        for start in range(0, positions, step):
            part = slice(start, start + step)
            left = _placed(g[:, part] * self.signs.to(g), places, self.width)
            right = _placed(h[:, part] * self.signs_in.to(g), places_in, self.width)
            total += (torch.fft.rfft(left) * torch.fft.rfft(right)).sum(1)
        found: Tensor = torch.fft.irfft(total, n=self.width)
        return found


def _placed(rows: Float[Tensor, "n t d"], places: Int[Tensor, " d"], width: int) -> Float[Tensor, "n t width"]:
    return rows.new_zeros(*rows.shape[:2], width).index_add_(2, places, rows)


def draw_product_sketch(generator: torch.Generator, width: int, d_out: int, d_in: int) -> ProductSketch:
    """Draw a sketch of outer products.

    Args:
        generator: Source of its numbers.
        width: Numbers w.
        d_out: Numbers of a gradient.
        d_in: Numbers of an input, with the 1 of a bias.

    Returns:
        The sketch.
    """
    places = torch.randint(width, (d_out,), generator=generator)
    of_g, of_h = (signs(generator, count) for count in (d_out, d_in))
    turns = torch.randint(width, (-(-d_in // width),), generator=generator)
    return ProductSketch(width, places, of_g, turns.tolist(), of_h)


def products(
    one: tuple[Float[Tensor, "n t d_out"], Float[Tensor, "n t d_in"]],
    other: tuple[Float[Tensor, "n s d_out"], Float[Tensor, "n s d_in"]],
) -> Float[Tensor, " n"]:
    """Inner products of two gradients of each example, from what they are products of.

    Args:
        one: g and h of n examples.
        other: g and h of the same examples, at other positions.

    Returns:
        ⟨Σ_t g_t h_tᵀ, Σ_s g'_s h'_sᵀ⟩ = Σ_ts (g_t · g'_s)(h_t · h'_s).
    """
    (g, h), (of_g, of_h) = one, other
    return ((g @ of_g.mT) * (h @ of_h.mT)).sum((1, 2))
