"""LoRA+: B learns at a rate that is λ times that of A, and the kernel weighs its part by λ.

A step of gradient descent with rates η of A and λη of B moves the outputs by −η (K_A + λ K_B) ∂ℓ/∂z: the kernel of
LoRA+ is K_A + λ K_B. With B = 0 there is no K_A, and λ is a factor of the whole kernel: it changes no condition number,
no alignment and no ranking, only how far a rate goes.
"""

from dataclasses import replace

from foretune.errors import KernelError
from foretune.ntk.features import TangentFeatures


def lora_plus(features: TangentFeatures, ratio: float) -> TangentFeatures:
    """Weigh the gradients with respect to B, so that `tangent_kernel` makes K_A + λ K_B of them.

    As `peft.optimizers.create_loraplus_optimizer` sorts them, what has one axis, such as magnitudes and biases, learns
    at the rate of B.

    Args:
        features: Of an adapter, without a head.
        ratio: λ = η_B / η_A, above 0.

    Returns:
        Features with those of B and of all vectors times √λ.

    Raises:
        KernelError: If the ratio is not above 0, or there is a head, whose weights and biases would have two rates.

    References:
        Hayou, Ghosh and Yu, LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv:2402.12354.
    """
    if not 0.0 < ratio < float("inf"):
        raise KernelError(f"ratio = {ratio}: the rate of B over that of A must be a number above 0")
    if features.head:
        raise KernelError("LoRA+ gives the head's weights and biases two rates: leave the head out of the features")
    root = ratio**0.5
    weighed = tuple(None if v is None else v * root for v in features.v)
    return replace(features, b=tuple(b * root for b in features.b), v=weighed)
