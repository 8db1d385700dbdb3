"""Connectors: what stage 2 trains. Encoder frames (T, D_encoder) go in, speech tokens (N, D) come out.

Shapes:  B spans of speech, T encoder frames, N = T / k speech tokens, k frames a token, D_encoder and D the widths of the encoder and of the LLM.
A connector is one class here and one entry of CONNECTORS.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from files import UserError

DROPOUT = 0.1                # little speech is soon learned by heart


class StackMLP(nn.Module):
    """Stack k neighbouring frames, then a two-layer MLP (as in SLAM-ASR, arXiv 2402.08846).

    frames (B, N * k, D_encoder) -> (B, N, k * D_encoder) -> LayerNorm, MLP with dropout -> (B, N, D)
    """

    def __init__(self, width_in, width_out, k, hidden):
        super().__init__()
        self.k = k
        self.norm = nn.LayerNorm(k * width_in)
        self.mlp = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(k * width_in, hidden), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(hidden, width_out))

    def forward(self, x):
        return self.mlp(self.norm(x.reshape(len(x), -1, self.k * x.shape[-1])))     # (B, N, k * D_encoder) -> (B, N, D)


class Conv(nn.Module):
    """Strided 1-d convolutions, each halving the rate, then a two-layer MLP with a residual (BLSP, arXiv 2309.00916, section 3.1).

    frames (B, N * k, D_encoder) -> log2(k) convolutions of stride 2 -> (B, N, D_encoder) -> (B, N, D)
    """

    def __init__(self, width_in, width_out, k, hidden):
        super().__init__()
        if k & (k - 1):
            raise UserError(f"the conv connector halves the frame rate, so --k must be a power of two, not {k}")
        self.convs = nn.ModuleList(nn.Conv1d(width_in, width_in, 5, stride=2, padding=2) for _ in range(int(math.log2(k))))
        self.project = nn.Linear(width_in, width_out)
        self.norm = nn.LayerNorm(width_out)
        self.adapter = nn.Sequential(nn.Linear(width_out, hidden), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(hidden, width_out))

    def forward(self, x):
        for conv in self.convs:
            x = F.gelu(conv(x.transpose(1, 2))).transpose(1, 2)    # (B, T, D_encoder) -> (B, T / 2, D_encoder)
        x = self.norm(self.project(x))                             # (B, N, D)
        return x + self.adapter(x)


class QFormer(nn.Module):
    """A learned query reads each window of k frames through two Transformer layers (SALMONN, arXiv 2310.13289, section 3.1; as in Self-Powered LSM).

    frames (B, N * k, D_encoder) -> windows (B * N, k, hidden) -> one query each, cross-attention -> (B * N, 1, hidden) -> (B, N, D)
    """

    HEADS, LAYERS = 8, 2

    def __init__(self, width_in, width_out, k, hidden):
        super().__init__()
        if hidden % self.HEADS:
            raise UserError(f"the qformer connector has {self.HEADS} attention heads, so --hidden must be a multiple of {self.HEADS}, not {hidden}")
        self.k = k
        self.norm, self.enter = nn.LayerNorm(width_in), nn.Linear(width_in, hidden)
        self.position = nn.Parameter(0.02 * torch.randn(k, hidden))          # of a frame in its window: attention alone knows no order
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, hidden))
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(hidden, self.HEADS, 2 * hidden, DROPOUT, "gelu", batch_first=True, norm_first=True)
                                    for _ in range(self.LAYERS))
        self.leave = nn.Linear(hidden, width_out)

    def forward(self, x):
        windows = self.enter(self.norm(x)).reshape(-1, self.k, self.position.shape[1]) + self.position    # (B * N, k, hidden)
        queries = self.query.expand(len(windows), -1, -1)                                                 # (B * N, 1, hidden)
        for layer in self.layers:
            queries = layer(queries, windows)
        return self.leave(queries).reshape(len(x), -1, self.leave.out_features)                           # (B, N, D)


CONNECTORS = {"stack-mlp": StackMLP, "conv": Conv, "qformer": QFormer}


def frames_a_token(kind, frame_rate, tokens_per_second):
    """How many encoder frames make one speech token, for about so many tokens a second of speech."""
    k = max(1.0, frame_rate / tokens_per_second)
    return 2 ** round(math.log2(k)) if kind == "conv" else round(k)


def hidden_width(kind, llm_width):
    """(hidden width, the reason): for an MLP four times the LLM's width, at most 2048; for the Transformer layers of a Q-Former that width itself, a multiple
    of 64, at most 1024."""
    if kind == "qformer":
        return min(1024, -(-llm_width // 64) * 64), f"the LLM's width of {llm_width}, as a multiple of 64, at most 1024"
    return min(2048, 4 * llm_width), f"four times the LLM's width of {llm_width}, at most 2048"


class Connector(nn.Module):
    """Encoder frames to speech tokens: k frames a token, and a scale that starts the tokens at the norm of the LLM's own embeddings."""

    def __init__(self, kind, width_in, width_out, k, hidden, embedding_rms=1.0):
        super().__init__()
        if kind not in CONNECTORS:
            raise UserError(f"there is no connector {kind!r}; there are {', '.join(CONNECTORS)}")
        self.k, self.body = k, CONNECTORS[kind](width_in, width_out, k, hidden)
        self.scale = nn.Parameter(torch.full((width_out,), float(embedding_rms)))

    def forward(self, spans):
        """[frames (T_i, D_encoder)] -> [speech tokens (N_i, D)], N_i = T_i / k rounded up; the last token's missing frames are zeros.

        Spans of as many tokens go through together: nothing is padded beyond that, so a span's tokens do not depend on its batch.
        """
        tokens, by_length = [None] * len(spans), {}
        for i, frames in enumerate(spans):
            by_length.setdefault(-(-len(frames) // self.k), []).append(i)
        for n, rows in by_length.items():
            x = torch.stack([F.pad(spans[i], (0, 0, 0, n * self.k - len(spans[i]))) for i in rows]).to(self.scale)   # (B, N * k, D_encoder)
            y = self.body(x) if n else x.new_zeros(len(rows), 0, len(self.scale))                                    # (B, N, D)
            for i, row in zip(rows, F.rms_norm(y, y.shape[-1:]) * self.scale):
                tokens[i] = row
        return tokens
