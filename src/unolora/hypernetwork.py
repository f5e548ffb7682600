"""UnoLoRA, part 2: the hypernetwork that turns task, place in the network and sample into a rank-wise scale.

    b   = B_mlp(x_bar)                          the sample, through a bottleneck    (eqs. 3-4)
    e_t = C_mlp([e_task ; e_pos ; b])           task, place and sample combined     (eqs. 5-6)
    s_p = 1 + S_p e_t                           one linear map for each projection  (eq. 8)

x_bar is the mean of the input token embeddings. The network is shared by all projections and runs once a batch: the
last map is batched over positions, so that s comes out as one tensor [B, P, R]. `scale_init="paper"` leaves out the 1;
with B zero as well, the product then starts at a two-fold zero, which slows the start. `gated` bounds the scale,
s_p = 1 + tanh(S_p e_t); `shared_map` has one S for all projections, which their positions alone then tell apart.

The paper's code averages over padding as well, so that a sample's scale depends on its neighbours in the batch; here
the attention mask counts. It takes positions modulo 48 while T5-base has 72 projections; here each has its own, unless
`num_positions` says otherwise.

With `conditioning="text"` e_task comes from the task's description instead of a row of its own: see `words.py`.

Axes: B batch, T tokens, D width (d_s), d embedding width (d_e), R rank, P positions, K tasks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def encode_sample(embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average the input embeddings of each sample over the tokens that count.

    Args:
        embeddings: Token or patch embeddings [B, T, D].
        mask: 1 for the tokens that count [B, T]; all of them when None. A sample with none gets zeros.

    Returns:
        x_bar [B, D], in float32 at least: a sum over many tokens loses digits in half precision.
    """
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    if mask is None:
        return embeddings.mean(dim=1)
    weights = mask.to(embeddings.dtype).unsqueeze(-1)  #               [B, T, 1]
    return (embeddings * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class Hypernetwork(nn.Module):
    """Task t, position p and sample x_bar -> s [B, P, R].

    Args:
        num_tasks: K, rows of the task embedding (|T|).
        num_adapters: P, adapted projections.
        r: R, rank of the shared pairs.
        sample_dim: D, width of the sample encoding (d_s); None leaves the sample out (`conditioning="task"`).
        embedding_dim: d, width of the embeddings and of e_t (d_e = d_h).
        bottleneck_dim: width of the bottleneck (d_b).
        scale_init: "one" or "paper", see above.
        gated, shared_map: see above.
        num_positions: rows of the position embedding (p_max); P by default, fewer are shared modulo their number.
        task_embedding: gives e_task [B, d] for rows of tasks [B]; by default each task has a row of its own.
    """

    def __init__(
        self,
        num_tasks: int,
        num_adapters: int,
        r: int,
        *,
        sample_dim: int | None,
        embedding_dim: int = 8,
        bottleneck_dim: int = 16,
        scale_init: str = "one",
        gated: bool = False,
        shared_map: bool = False,
        num_positions: int | None = None,
        task_embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        d, P = embedding_dim, num_adapters
        self.num_adapters, self.num_positions = P, num_positions or P
        self.start = 1.0 if scale_init == "one" else 0.0
        self.gated = gated
        self.task_embedding = nn.Embedding(num_tasks, d) if task_embedding is None else task_embedding
        self.position_embedding = nn.Embedding(self.num_positions, d)
        self.bottleneck = None if sample_dim is None else _mlp(sample_dim, bottleneck_dim, bottleneck_dim, d)
        self.combine = _mlp(2 * d if sample_dim is None else 3 * d, 2 * d, 2 * d, 2 * d, d)
        maps = 1 if shared_map else P
        self.scale_weight = nn.Parameter(torch.empty(maps, r, d))  # S_p, one map for each projection
        self.scale_bias = nn.Parameter(torch.zeros(maps, r))
        if scale_init == "one":
            self._spread()
        else:
            nn.init.normal_(self.scale_weight, std=0.02)

    def _spread(self) -> None:
        """Start with s spread around 1, other for each task and place: with B zero the output is still that of W.

        torch's own start shrinks the signal at every layer, so that e_t would hardly tell tasks apart.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.scale_weight, std=0.5 * self.scale_weight.shape[-1] ** -0.5)

    def forward(self, tasks: Tensor, sample: Tensor | None = None) -> Tensor:
        """Return s for every sample and projection.

        Args:
            tasks: Rows of the task embedding [B].
            sample: x_bar [B, D]; None when the hypernetwork was made without the sample.

        Returns:
            s [B, P, R].
        """
        P = self.num_adapters
        position = torch.arange(P, device=tasks.device) % self.num_positions
        e_task = self.task_embedding(tasks).unsqueeze(1).expand(-1, P, -1)  #         [B, P, d]
        e_pos = self.position_embedding(position).unsqueeze(0).expand(len(tasks), -1, -1)  # [B, P, d]
        parts = [e_task, e_pos]
        if self.bottleneck is not None:
            assert sample is not None
            b = self.bottleneck(sample.to(self.scale_weight.dtype))  #                [B, d]
            parts.append(b.unsqueeze(1).expand(-1, P, -1))
        e_t = self.combine(torch.cat(parts, dim=-1))  #                               [B, P, d]
        maps = self.scale_weight.expand(P, -1, -1)  #                                 [P, R, d]
        S = torch.einsum("bpd,prd->bpr", e_t, maps) + self.scale_bias  #              [B, P, R]
        return self.start + (torch.tanh(S) if self.gated else S)


def _mlp(*widths: int) -> nn.Sequential:
    """Linear maps through these widths, ReLU after each but the last."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
