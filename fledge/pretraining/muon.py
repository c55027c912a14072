"""Muon for the matrices of the layers and AdamW for everything else, as one optimizer for `Trainer`.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of a matrix and so
learns more from each step. Its learning rate is matched to AdamW's (Liu et al. 2025), so one schedule serves both.
"""

from typing import Any

import torch
from transformers import PreTrainedModel


class MuonWithAdamW(torch.optim.Optimizer):
    """Combines two optimizers, `parts`. Their parameter groups are shared, so that one schedule sets both."""

    def __init__(self, model: PreTrainedModel, lr: float, weight_decay: float, betas: tuple[float, float], eps: float):
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.dim() == 2 and ".h." in name]
        tables = [p for name, p in named if p.dim() == 2 and ".h." not in name]
        vectors = [p for _, p in named if p.dim() < 2]
        adamw: list[dict[str, Any]] = [
            {"params": tables, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        super().__init__([*adamw, {"params": matrices}], {"lr": lr})
        self.parts = [
            torch.optim.AdamW(adamw, lr=lr, betas=betas, eps=eps, fused=True),
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        ]
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # Trainer passes no closure
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, of_part in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(of_part)
        self._share()
