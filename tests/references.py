"""Slow, independent references: loops over samples and outputs. Imports nothing from foretune."""

import numpy as np
import torch


def parameter_gradients(model, sequences, directions, parameters):
    """n × k × P gradients of `logits @ directions`, one example and one output at a time, no padding."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    rows = []
    for sequence in sequences:
        logits = model(input_ids=torch.tensor([sequence]), attention_mask=torch.ones(1, len(sequence))).logits[0]
        outputs = logits @ torch.as_tensor(directions, dtype=logits.dtype)
        row = []
        for output in outputs:
            gradients = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
            parts = [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for g, p in zip(gradients, parameters, strict=True)
            ]
            row.append(torch.cat(parts))
        rows.append(torch.stack(row))
    return torch.stack(rows).detach().double().numpy()


def named_parameters(model, *parts):
    return [p for n, p in model.named_parameters() if all(part in n for part in parts)]


def scalar_kernel(gradients, scale=1.0):
    """Σ over outputs of the inner products: n × n."""
    n = len(gradients)
    kernel = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            for k in range(gradients.shape[1]):
                kernel[i, j] += scale * float(np.dot(gradients[i, k], gradients[j, k]))
    return kernel


def full_kernel(gradients):
    """Rows (example, output), example-major."""
    flat = gradients.reshape(-1, gradients.shape[-1])
    return flat @ flat.T
