"""A second implementation in float64, written from the SPEC alone: no cache, no batch, nothing of the package.

It recomputes the whole sequence for every token, and says what it does in the SPEC's own order.
"""

from __future__ import annotations

import numpy as np
import torch

EPSILON = 1e-5


class Twin:
    """The network of SPEC 2 for one sequence. ``weights``: released names, any float dtype."""

    def __init__(self, layers: int, heads: int, weights: dict[str, torch.Tensor], table: str = "float32") -> None:
        self.layers, self.heads, self.table = layers, heads, table
        self.w = {name: tensor.double() for name, tensor in weights.items()}
        self.embedding = self.w["transformer.word_embeddings.weight"]
        self.vocabulary, self.hidden = self.embedding.shape
        self.d = self.hidden // heads

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + EPSILON)
        return scaled * self.w[f"transformer.{name}.weight"] + self.w[f"transformer.{name}.bias"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.w[f"transformer.{name}.weight"].T + self.w[f"transformer.{name}.bias"]

    def angles(self, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """SPEC 2.3: cosines and sines ``[s, d/2]``."""
        p = np.asarray(positions, dtype=np.float64)[:, None]
        theta = 10000.0 ** (-2 * np.arange(self.d // 2) / self.d)
        if self.table == "float32":
            return torch.from_numpy(np.cos(p * theta)), torch.from_numpy(np.sin(p * theta))
        half = np.float16
        angle = (p * theta.astype(np.float32).astype(half).astype(np.float64)).astype(half).astype(np.float64)
        cos, sin = (f(angle).astype(half).astype(np.float64) for f in (np.cos, np.sin))
        return torch.from_numpy(cos), torch.from_numpy(sin)

    def attention(self, x: torch.Tensor, layer: int, positions: list[int], hidden: np.ndarray) -> torch.Tensor:
        qkv = self.linear(x, f"layers.{layer}.attention.query_key_value")
        cos, sin = self.angles(positions)

        def turn(y: torch.Tensor) -> torch.Tensor:
            a, b = y[:, : self.d // 2], y[:, self.d // 2 :]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        out = []
        for head in range(self.heads):
            q, k, v = qkv[:, 3 * self.d * head : 3 * self.d * (head + 1)].split(self.d, dim=-1)
            c = layer + 1.0
            scores = (turn(q) / (self.d**0.5 * c)) @ turn(k).T
            scores[torch.from_numpy(hidden)] = -10000.0
            out.append(torch.softmax(scores * c, dim=-1) @ v)
        return self.linear(torch.cat(out, dim=-1), f"layers.{layer}.attention.dense")

    def mlp(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        u, v = self.linear(x, f"layers.{layer}.mlp.dense_h_to_4h").chunk(2, dim=-1)
        gated = u * (v / 2 * (1 + torch.erf(v / 2**0.5)))
        return self.linear(gated, f"layers.{layer}.mlp.dense_4h_to_h")

    def logits(self, tokens: list[int], positions: list[int], hidden: np.ndarray) -> torch.Tensor:
        """``[s, v]``; ``hidden[i, j]`` True: i does not see j (SPEC 2.1)."""
        alpha = (2 * self.layers) ** 0.5
        x = self.embedding[torch.tensor(tokens)]
        for layer in range(self.layers):
            a = self.norm(x, f"layers.{layer}.input_layernorm")
            h = alpha * a + self.attention(a, layer, positions, hidden)
            m = self.norm(h, f"layers.{layer}.post_attention_layernorm")
            x = alpha * m + self.mlp(m, layer)
        return self.norm(x, "final_layernorm") @ self.embedding.T


def sequence(part_a: list[int], mask_index: int, running: bool, answer: list[int], sop: int) -> tuple[list, list, np.ndarray]:
    """Tokens, positions and hidden places of a prompt and its answer so far (SPEC 3.3)."""
    n = len(part_a)
    tokens = [*part_a, sop, *answer]
    positions = [i if i < n or running else mask_index for i in range(len(tokens))]
    hidden = np.array([[not (j < n or j <= i) for j in range(len(tokens))] for i in range(len(tokens))])
    return tokens, positions, hidden


class Filler:
    """Generation of SPEC 5 for one blank: greedy and beam search."""

    def __init__(self, twin: Twin, special: dict[str, int]) -> None:
        self.twin, self.special = twin, special
        self.ends = [special["eop"], special["eos"]]

    def scores(self, part_a: list[int], mask_index: int, answer: list[int]) -> torch.Tensor:
        """Logits of the next token."""
        running = part_a[mask_index] == self.special["[gMASK]"]
        return self.twin.logits(*sequence(part_a, mask_index, running, answer, self.special["sop"]))[-1]

    def greedy(self, part_a: list[int], mask_index: int, room: int) -> list[int]:
        answer: list[int] = []
        while len(answer) < room and not (answer and answer[-1] in self.ends):
            answer.append(int(self.scores(part_a, mask_index, answer).argmax()))
        return answer

    def beam(
        self,
        part_a: list[int],
        mask_index: int,
        room: int,
        beams: int,
        penalty: float,
        ngram: int,
        shortest: int,
        consider_end: bool,
    ) -> list[tuple[float, list[int]]]:
        """(score, answer) of the returned beams, best first (SPEC 5.4)."""
        context = [*part_a, self.special["sop"]]
        live: list[tuple[float, list[int], dict]] = [(0.0, [], {})]
        finished: list[tuple[float, list[int]]] = []
        done = False

        def penalised(score: float, length: int) -> float:
            return score / ((5 + length) / 6) ** penalty

        def insert(score: float, answer: list[int]) -> None:
            place = 0
            while place < len(finished) and finished[place][0] > score:
                place += 1
            finished.insert(place, (score, answer))
            del finished[beams:]

        def last_ids(answer: list[int]) -> tuple[int, ...]:
            return tuple((context + answer)[len(context) + len(answer) - (ngram - 1) :])

        for step in range(room):
            s = len(context) + step
            candidates = []
            for parent, (score, answer, banned) in enumerate(live):
                logits = self.scores(part_a, mask_index, answer)
                if step < shortest:
                    logits[self.ends] = -65504
                if ngram > 0 and s > ngram:
                    for token in banned.get(last_ids(answer), []):
                        logits[token] = -65504
                logs = torch.log_softmax(logits, dim=-1) + score
                candidates += [(float(value), parent, token) for token, value in enumerate(logs)]
            candidates.sort(key=lambda c: -c[0])
            new = []
            for score, parent, token in candidates[: (len(self.ends) + 1) * beams]:
                answer, banned = live[parent][1], live[parent][2]
                if token in self.ends:
                    insert(penalised(score, s + 1), [*answer, token])
                elif len(new) < beams:
                    copy = {key: list(ids) for key, ids in banned.items()}
                    copy.setdefault(last_ids(answer), []).append(token)
                    new.append((score, [*answer, token], copy))
                else:
                    break
            live = new
            if len(finished) == beams and finished[-1][0] >= penalised(live[0][0], s + 1):
                done = True
                break
        if not consider_end:
            return [(score, answer) for score, answer, _ in live]
        if not done:
            for score, answer, _ in live:
                insert(penalised(score, len(context) + len(answer)), answer)
        return finished
