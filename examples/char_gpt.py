"""Trains a GPT on the text of Python's own help, character by character, and lets it write.

python examples/char_gpt.py [--steps 900] [--prompt "The "] [--torch]

The text is what `help()` shows of the language: `pydoc_data.topics`, which every Python brings along. Every tenth topic is
kept for the test. The perplexity (how many equally likely characters would be as hard to guess) is compared with that of
bigrams: the share of each character among those that follow a given one in the training text.
"""

import argparse
import math
import sys
import time
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fastnn

STEPS = 900
BATCH, BLOCK = 24, 128
LEARNING_RATE = 3e-3


def load():
    """The characters, and both parts of the text as their numbers."""
    texts = [topics[name] for name in sorted(topics)]
    characters = sorted(set("".join(texts)))
    number = {character: index for index, character in enumerate(characters)}

    def encoded(chosen):
        return torch.tensor([number[character] for text in chosen for character in text])

    test = texts[::10]
    train = [text for index, text in enumerate(texts) if index % 10]
    return characters, encoded(train), encoded(test)


def bigram_loss(train, test, vocabulary):
    """Nats a character, with one count for pairs that were never seen."""
    counts = torch.ones(vocabulary, vocabulary)
    counts.index_put_((train[:-1], train[1:]), torch.tensor(1.0), accumulate=True)
    return F.nll_loss(counts.div(counts.sum(1, keepdim=True)).log()[test[:-1]], test[1:]).item()


def gpt_loss(model, test):
    """Nats a character, each predicted from those before it in its block."""
    length = (len(test) - 1) // BLOCK * BLOCK
    blocks = zip(
        test[:length].view(-1, BLOCK).split(BATCH), test[1 : length + 1].view(-1, BLOCK).split(BATCH), strict=True
    )
    with torch.no_grad():
        total = sum(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item() for x, y in blocks)
    return total / length


def train(model, text, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("", total=steps, loss="")
        for _ in range(steps):
            starts = torch.randint(len(text) - BLOCK, (BATCH,))
            rows = text[starts[:, None] + torch.arange(BLOCK + 1)]
            loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, loss=f"{loss.item():.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--prompt", default="The ", help="what the samples begin with")
    parser.add_argument("--torch", action="store_true", help="on torch's layers instead, to compare the times")
    options = parser.parse_args()

    torch.manual_seed(0)
    characters, text, test = load()
    print(f"{len(text):,} characters to train on, {len(test):,} to test on, {len(characters)} different ones")
    model = fastnn.models.GPT(len(characters), BLOCK, n_layer=4, n_head=4, n_embd=128, dropout=0.0)
    if options.torch:
        fastnn.revert(model)
    start = time.perf_counter()
    train(model, text, options.steps)
    print(f"{options.steps} steps in {time.perf_counter() - start:.1f} s")

    model.eval()
    reached, bigrams = gpt_loss(model, test), bigram_loss(text, test, len(characters))
    for name, loss in (("GPT", reached), ("bigrams", bigrams)):
        print(f"{name}: {loss:.3f} nats a character on the test topics, perplexity {math.exp(loss):.2f}")

    prompt = torch.tensor([[characters.index(character) for character in options.prompt if character in characters]])
    generator = torch.Generator().manual_seed(0)
    for top_p in (0.5, 0.9):
        found = model.generate(prompt, 300, temperature=0.8, top_p=top_p, generator=generator)
        print(f"\n---- top_p={top_p}\n" + "".join(characters[token] for token in found[0].tolist()))
    if options.steps >= STEPS and reached >= bigrams:
        print("FAILED: it must predict better than bigrams do")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
