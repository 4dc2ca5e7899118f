"""The distillation loss of DeiT (arXiv 2012.12877), with which SHViT, EfficientFormer and STViT are trained too.

    loss = (1 - alpha) * base_loss + alpha * D
    hard: D = cross entropy of the student's distillation logits with the teacher's decision
    soft: D = tau^2 / (batch * classes) * KL(teacher || student) at temperature tau, summed over the batch

The soft form divides by the number of elements, as published, not by the batch: it is `classes` times smaller than the
usual distillation loss, and alpha is to be chosen for that.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F


def distillation_loss(
    base_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    *,
    kind: Literal["hard", "soft"] = "hard",
    alpha: float = 0.5,
    tau: float = 1.0,
) -> Tensor:
    """student, teacher: logits (B, classes); the student's are of its distillation head. No gradient to the teacher."""
    teacher = teacher.detach()
    if kind == "hard":
        distilled = F.cross_entropy(student, teacher.argmax(1))
    else:
        log_p, log_q = (teacher / tau).log_softmax(1), (student / tau).log_softmax(1)
        distilled = F.kl_div(log_q, log_p, reduction="sum", log_target=True) * tau**2 / student.numel()
    return (1 - alpha) * base_loss + alpha * distilled
