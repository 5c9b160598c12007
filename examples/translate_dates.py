"""Trains an encoder-decoder transformer to read dates as people write them: "3 March 2021" becomes "2021-03-03".

python examples/translate_dates.py [--steps 500] [--torch]

Source and target are spelled character by character. A fifth of all days from 1900 to 2099 is never trained on; of dates on
those days at least 99 % must come out right, in every character.
"""

import argparse
import datetime
import random
import sys
import time

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fastnn

STEPS = 500
BATCH = 128
LEARNING_RATE = 3e-3
#: Of the test dates, after the default number of steps.
ACCURACY = 0.99
TESTED = 1000

MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
FORMATS = (
    lambda date: f"{date.day} {MONTHS[date.month - 1]} {date.year}",
    lambda date: f"{MONTHS[date.month - 1]} {date.day}, {date.year}",
    lambda date: f"{date.day}. {MONTHS[date.month - 1][:3]} {date.year}",
    lambda date: f"{date.month}/{date.day}/{date.year}",
)

PADDING, START, END = range(3)
CHARACTERS = sorted(set("".join(MONTHS) + "0123456789 .,/-"))
NUMBER = {character: index for index, character in enumerate(CHARACTERS, start=3)}


def encoded(texts):
    """(N, longest + 2) numbers: start, the characters, end, padding."""
    rows = [[START, *(NUMBER[character] for character in text), END] for text in texts]
    longest = max(map(len, rows))
    return torch.tensor([row + [PADDING] * (longest - len(row)) for row in rows])


def decoded(row):
    """The characters between start and end."""
    found = row.tolist()[1:]
    found = found[: found.index(END)] if END in found else found
    return "".join(CHARACTERS[token - 3] for token in found if token >= 3)


def days(chance):
    """Those to train on, and those to test on."""
    first = datetime.date(1900, 1, 1).toordinal()
    every = list(range(first, datetime.date(2100, 1, 1).toordinal()))
    chance.shuffle(every)
    found = [datetime.date.fromordinal(day) for day in every]
    return found[len(found) // 5 :], found[: len(found) // 5]


def pairs(chosen, chance):
    """Each date in one of the formats, and as it should come out."""
    return [chance.choice(FORMATS)(date) for date in chosen], [date.isoformat() for date in chosen]


def train(model, dates, chance, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
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
            sources, targets = map(encoded, pairs(chance.sample(dates, BATCH), chance))
            logits = model(sources, targets[:, :-1], sources == PADDING)
            loss = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=PADDING)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, loss=f"{loss.item():.4f}")


def translate(model, texts):
    sources = encoded(texts)
    found = model.greedy_decode(sources, 14, START, END, sources == PADDING)
    return [decoded(row) for row in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--torch", action="store_true", help="on torch's layers instead, to compare the times")
    options = parser.parse_args()

    torch.manual_seed(0)
    chance = random.Random(0)
    train_days, test_days = days(chance)
    size = 3 + len(CHARACTERS)
    model = fastnn.models.Seq2SeqTransformer(
        *(2, 2, 64, 4), src_vocab_size=size, tgt_vocab_size=size, dim_feedforward=128, dropout=0.0, maxlen=32
    )
    if options.torch:
        fastnn.revert(model)
    start = time.perf_counter()
    train(model, train_days, chance, options.steps)
    print(f"{options.steps} steps in {time.perf_counter() - start:.1f} s")

    model.eval()
    sources, expected = pairs(test_days[:TESTED], chance)
    found = translate(model, sources)
    for source, target in list(zip(sources, found, strict=True))[:8]:
        print(f"{source:>20}  {target}")
    reached = sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)
    print(f"{reached:.1%} of {len(expected)} dates on days that were never trained on come out right")
    if options.steps >= STEPS and reached < ACCURACY:
        print(f"FAILED: at least {ACCURACY:.0%} is asked for")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
