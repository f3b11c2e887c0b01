"""Stage 0: train the text encoder by itself, in a minute on a CPU or a GPU, then leave it as it is.

    python -m tools.small_model.train_text --out OUT

Every token's embedding is asked, through one linear layer, for all that the caption states. So each token carries
which colour belongs to which shape, and the video model can read the whole caption anywhere. That is simpler than
training it within the video model: the embeddings can be cached from the start, and minutes on the GPU go to video.
Writes OUT/tokenizer and OUT/text_encoder. Held-out combinations are never shown here either.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F

from .captions import ATTRIBUTES, phrase
from .files import fresh_folder, say
from .scenes import HELD_MOTIONS, HELD_THINGS
from .text import make_encoder, make_tokenizer

UNSAID = 0
_FILLERS = ("please", "shiny", "slowly")  # unknown to the tokenizer


def draw(rng: random.Random, held: bool = False) -> dict[str, object]:
    """Attributes of a caption at random, of the kinds `captions.stated` gives; with `held`, held-out ones."""
    while True:
        said: dict[str, object] = {name: rng.choice(values) for name, values in ATTRIBUTES.items()}
        if rng.random() < 0.5:
            said.update(dict.fromkeys(("relation", "other colour", "other shape")))
        else:
            said["count"] = None
        for name in ("size", "motion", "background"):
            if rng.random() < 0.35:
                said[name] = None
        if not held and rng.random() < 0.03:
            said = dict.fromkeys(said)
        if is_held(said) == held:
            return said


def is_held(said: dict[str, object]) -> bool:
    """Whether a caption states a combination that training never shows."""
    things = ((said["colour"], said["shape"]), (said["other colour"], said["other shape"]))
    return any(thing in HELD_THINGS or (thing[1], said["motion"]) in HELD_MOTIONS for thing in things)


def spoken(said: dict[str, object], rng: random.Random) -> str:
    """The caption, now and then without its article or with a word nobody knows."""
    text = phrase(said)
    if rng.random() < 0.1:
        text = text.removeprefix("a ")
    if rng.random() < 0.1:
        listed = text.split()
        listed.insert(rng.randrange(len(listed) + 1), rng.choice(_FILLERS))
        text = " ".join(listed)
    return text


class Reader(torch.nn.Module):
    """The encoder and one linear layer to all attributes; dropped after training."""

    def __init__(self, encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.sizes = [len(values) + 1 for values in ATTRIBUTES.values()]
        self.head = torch.nn.Linear(encoder.config.d_model, sum(self.sizes))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """For each attribute the scores `[real tokens, values + 1]` of every real token of the batch."""
        states = self.encoder(ids, mask).last_hidden_state
        return list(self.head(states[mask.bool()]).split(self.sizes, -1))


def batch_of(saids: list[dict[str, object]], texts: list[str], tokenizer, device) -> tuple:
    """Token ids, mask, and for each attribute the right answer of every real token."""
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(device)
    row = batch.attention_mask.nonzero()[:, 0]
    answers = [
        torch.tensor([UNSAID if said[name] is None else 1 + values.index(said[name]) for said in saids], device=device)[
            row
        ]
        for name, values in ATTRIBUTES.items()
    ]
    return batch.input_ids, batch.attention_mask, answers


@torch.no_grad()
def accuracy(reader: Reader, tokenizer, device, held: bool, count: int = 512) -> float:
    """Part of the tokens of new captions that tell every attribute right."""
    rng = random.Random(f"measure {held}")
    saids = [draw(rng, held) for _ in range(count)]
    ids, mask, answers = batch_of(saids, [phrase(said) for said in saids], tokenizer, device)
    right = [scores.argmax(-1) == answer for scores, answer in zip(reader(ids, mask), answers, strict=True)]
    return float(torch.stack(right).all(0).float().mean())


def train(steps: int, batch: int, device: torch.device, seed: int = 0, rate: float = 2e-3):
    """Train from nothing. Returns tokenizer, encoder, and the accuracies on seen and held-out combinations."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    reader = Reader(make_encoder(tokenizer)).to(device)
    # The embedding table starts at a spread of 1, which a small model does not outgrow.
    reader.encoder.shared.weight.data.mul_(0.1)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        saids = [draw(rng) for _ in range(batch)]
        ids, mask, answers = batch_of(saids, [spoken(said, rng) for said in saids], tokenizer, device)
        loss = sum(F.cross_entropy(s, a) for s, a in zip(reader(ids, mask), answers, strict=True))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            say(f"step {step + 1}: loss {float(loss.detach()):.4f}")
    reader.eval()
    scores = {name: accuracy(reader, tokenizer, device, name == "held") for name in ("seen", "held")}
    return tokenizer, reader.encoder, scores


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.small_model.train_text", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    fresh_folder(args.out)
    tokenizer, encoder, scores = train(args.steps, args.batch, torch.device(args.device))
    tokenizer.save_pretrained(args.out / "tokenizer")
    encoder.save_pretrained(args.out / "text_encoder")
    for name, score in scores.items():
        say(f"tokens that tell every attribute right, {name} combinations: {100 * score:.2f} %")


if __name__ == "__main__":
    main()
