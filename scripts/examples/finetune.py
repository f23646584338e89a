"""Fine-tuning: a pretrained text model with Hugging Face's interface, a new head, two rates.

The model is built here, so that the program needs no download. With ``transformers``, replace
`Classifier` by ``AutoModelForSequenceClassification.from_pretrained`` and `tokenize` by its
tokenizer: batches are mappings with ``labels``, and outputs have ``loss`` and ``logits``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

import harness
from harness.callbacks import Freeze

WORDS = {
    0: ["awful", "boring", "weak", "dull", "poor", "flat", "sad", "slow"],
    1: ["great", "funny", "strong", "bright", "rich", "sharp", "glad", "quick"],
    2: ["film", "book", "play", "song", "was", "the", "a", "very"],
}
VOCABULARY = ["[PAD]", *(word for words in WORDS.values() for word in words)]


class Encoder(nn.Module):
    """Turns words into a vector per position."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY), width, padding_idx=0)
        self.reader = nn.GRU(width, width, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Vectors ``[batch, length, width]``."""
        vectors: Tensor = self.reader(self.words(input_ids))[0]
        return vectors


class LanguageModel(nn.Module):
    """Predicts the next word: what the encoder is pretrained with, without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(32, len(VOCABULARY))

    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
        """Mean loss of each text's words after the first."""
        scores = self.head(self.encoder(input_ids[:, :-1]))
        return F.cross_entropy(scores.transpose(1, 2), input_ids[:, 1:], ignore_index=0)


class Classifier(nn.Module):
    """A head on the encoder; takes and returns what models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.classifier = Encoder(), nn.Linear(32, 2)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return ``logits``, and with `labels` the ``loss`` too."""
        mask = attention_mask.unsqueeze(2)
        mean = (self.encoder(input_ids) * mask).sum(1) / mask.sum(1)
        output = {"logits": self.classifier(mean)}
        if labels is not None:
            output["loss"] = F.cross_entropy(output["logits"], labels)
        return output

    def set_optimizers(self, lr: float) -> torch.optim.Optimizer:
        """Use a tenth of the learning rate for the pretrained part."""
        groups = [
            {"params": self.encoder.parameters(), "lr": lr / 10},
            {"params": self.classifier.parameters(), "lr": lr},
        ]
        return torch.optim.AdamW(groups)


def own_loss(output: Any, labels: Tensor) -> Tensor:
    """Return the loss that the model has computed."""
    loss: Tensor = output["loss"]
    return loss


def tokenize(count: int) -> dict[str, Tensor]:
    """Reviews of three to eight words, as a tokenizer returns them, and their labels."""
    labels, length = torch.randint(2, (count,)), torch.randint(3, 9, (count, 1))
    is_opinion = torch.rand(count, 8) < 0.4
    is_opinion[:, 0] = True
    kind = torch.where(is_opinion, labels.unsqueeze(1), 2)
    mask = (torch.arange(8) < length).long()
    ids = (1 + 8 * kind + torch.randint(8, (count, 8))) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def main(tracker: object = None) -> float:
    """Pretrain without labels, then fine-tune on thirty-two labelled reviews."""
    torch.manual_seed(1)
    texts = tokenize(2000)["input_ids"]
    loss = lambda pred, _: pred  # noqa: E731  the model returns its loss
    language = harness.setup(LanguageModel, loss=loss, optimizer=torch.optim.Adam)
    pretrained = language.set_opt_hparams(lr=1e-2).fit(
        {"input_ids": texts}, 4, seed=1, tracker=tracker
    )
    accuracy = MulticlassAccuracy(num_classes=2, average="micro")
    learner = harness.setup(
        Classifier,
        loss=own_loss,
        metrics={"accuracy": harness.on(accuracy, pred="logits")},
    ).set_opt_hparams(lr=2e-2)
    fitted = learner.fit(
        tokenize(32),
        12,
        tokenize(300),
        start=pretrained,
        strict=False,  # the heads differ
        callbacks=[Freeze("encoder", until=4)],
        dataloader_options={"batch_size": 8},
        seed=1,
        tracker=tracker,
    )
    found: float = fitted.records["metrics"]["valid"][-1]["accuracy"]
    print(f"{found:.1%} of 300 new reviews are classified correctly")
    return found


if __name__ == "__main__":
    main()
