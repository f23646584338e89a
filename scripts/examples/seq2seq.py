"""Sequence to sequence: sort the letters of a word, by an encoder, attention and a decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import harness

PAD, START, LETTERS = 0, 1, 12  # letters are 2, 3, ...


class Seq2Seq(nn.Module):
    """Reads a sequence, then writes another one, letter by letter."""

    ctx: harness.FitContext

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(LETTERS, width, padding_idx=PAD)
        self.encoder = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(width, 2 * width, batch_first=True)
        self.head = nn.Linear(4 * width, LETTERS)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder outputs at each position, and the initial state of the decoder."""
        memory, last = self.encoder(self.embed(source))
        return memory, torch.cat([*last], dim=1).unsqueeze(0)

    def decode(
        self, target: Tensor, memory: Tensor, state: Tensor, source: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores of the letter after each one of `target`, and the new state."""
        hidden, state = self.decoder(self.embed(target), state)
        likeness = hidden @ memory.transpose(1, 2)
        likeness = likeness.masked_fill((source == PAD).unsqueeze(1), -torch.inf)
        context = likeness.softmax(2) @ memory
        return self.head(torch.cat([hidden, context], dim=2)), state

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Scores given the correct letters so far (teacher forcing)."""
        memory, state = self.encode(source)
        before = F.pad(target[:, :-1], (1, 0), value=START)
        return self.decode(before, memory, state, source)[0]

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """Mean over the letters that are not padding, also in the average of the epoch."""
        self.ctx.rows = int((target != PAD).sum())
        return F.cross_entropy(pred.flatten(0, 1), target.flatten(), ignore_index=PAD)

    def predict(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Write letter by letter, each time the most likely one."""
        source, target = batch
        memory, state = self.encode(source)
        letter = torch.full((len(source), 1), START, device=source.device)
        letters = []
        for _ in range(target.shape[1]):
            scores, state = self.decode(letter, memory, state, source)
            letter = scores[:, -1].argmax(1, keepdim=True)
            letters.append(letter)
        return torch.cat(letters, dim=1)


def words(count: int, longest: int = 7) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Words of three to `longest` letters, padded, and the same sorted."""
    letters = torch.randint(2, LETTERS, (count, longest))
    is_padding = torch.arange(longest) >= torch.randint(3, longest + 1, (count, 1))
    source = letters.masked_fill(is_padding, PAD)
    target = source.masked_fill(is_padding, LETTERS).sort(dim=1).values
    target = target.masked_fill(target == LETTERS, PAD)
    return (source, target), target


def main(tracker: object = None) -> float:
    """Train, and count new words that are sorted without a mistake."""
    torch.manual_seed(1)
    learner = harness.setup(Seq2Seq, optimizer=torch.optim.Adam)
    fitted = learner.set_opt_hparams(lr=1e-2).fit(
        words(3000), 8, dataloader_options={"batch_size": 64}, tracker=tracker
    )
    (source, target), _ = words(500)
    written = fitted.predict(((source, target), target))
    is_right = ((written == target) | (target == PAD)).all(dim=1)
    share = float(is_right.float().mean())
    print(f"{share:.1%} of 500 new words are sorted without a mistake")
    return share


if __name__ == "__main__":
    main()
