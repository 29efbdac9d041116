"""Train the default model: a byte-level Llama of 3.3 M parameters with a context of 512 tokens.

Text: the standard library's own sources, its longer docstrings and help texts once more as prose (held-out modules
excluded), with windows of repeated segments, passkeys and needles mixed in. Lengths grow 64, 128, 256, 512. Every
window begins with the end-of-text token, as the tokenizer puts it in front, and every head begins its life at rest
on that token, as most heads of large models do when they have nothing to add. Run from the repository's root:

    python recipes/default_model.py --output runs/base
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longspan.text.corpus import Corpus
from longspan.text.documents import Document, split, standard_library
from longspan.text.encoding import encode
from longspan.text.needle import multikey, multiquery, needle
from longspan.text.passkey import passkey_prompt
from longspan.text.prompt import encoded
from longspan.text.repeats import repeated_segments

END = "<|endoftext|>"
PAD = "<|pad|>"
CONTEXT = 512
WIDTH, HEADS = 256, 8


class Stage(NamedTuple):
    """A part of a run: its steps, the length of its windows, the shares of their kinds, and of keys of few symbols."""

    steps: int
    length: int
    repeats: float
    passkeys: float
    needles: float
    few: float = 0.0


class Run(NamedTuple):
    """Stages that share their optimizers and one rise and fall of the rates, and the rates' size."""

    stages: tuple[Stage, ...]
    scale: float

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """Return the stage of a step, counted from 1."""
        for stage in self.stages:
            if step <= stage.steps:
                return stage
            step -= stage.steps
        raise ValueError(f"the run ends before step {step + self.steps}")


# The first run learns the language and to look back; the second one to copy keys whose digits come twice.
RUNS = (
    Run(
        (
            Stage(160, 64, 0.50, 0.00, 0.00),
            Stage(192, 128, 0.40, 0.10, 0.00),
            Stage(288, 256, 0.25, 0.15, 0.00),
            Stage(720, 512, 0.20, 0.15, 0.10),
            Stage(240, 512, 0.40, 0.20, 0.10),
        ),
        scale=1.0,
    ),
    Run((Stage(600, 512, 0.35, 0.25, 0.10, few=0.5),), scale=0.5),
)
BATCH_TOKENS = 8192
# An answer is a handful of tokens in a window of hundreds; each counts as many times as this in the loss.
ANSWER = 8.0
# Scores of resting heads in the first step, how many pairs of numbers carry them, and the size of embeddings.
REST = 6.0
RESTING_PAIRS = 3
INITIAL = 0.02
# Share of the plain windows that are cut from prose, and how long a docstring must be to count as such.
PROSE = 0.4
LONG = 300


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the 256 bytes, a separator and a padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, PAD])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, len(alphabet))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def untrained_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the architecture with random weights, its heads at rest."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            tie_word_embeddings=True,
            initializer_range=INITIAL,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rest(model, tokenizer.bos_token_id)
    return model


@torch.no_grad()
def rest(model: LlamaForCausalLM, first: int) -> None:
    """Let every head attend to the first token of a window where nothing else asks for its attention.

    The first number of an embedding says "any token" and the second one "the first token". Queries look for the
    second with what they find in the first, in the pairs of a head that turn slowest, and values leave it out, so a
    head at rest adds nothing. Training keeps what it needs of this, and a model that rests there loses its hold
    where distances grow beyond those it was trained at.
    """
    size = INITIAL * math.sqrt(WIDTH)
    embeddings = model.get_input_embeddings().weight
    embeddings[:, 0], embeddings[:, 1] = size, 0.0
    embeddings[first] = 0.0
    embeddings[first, 1] = size
    # After the norm, half of the length of an embedding is "any token", and all of the first token's is "first".
    any_token, first_token = math.sqrt(WIDTH / 2), math.sqrt(WIDTH)
    width = WIDTH // HEADS
    weight = math.sqrt(REST * math.sqrt(width) / (any_token * first_token) / RESTING_PAIRS)
    slow = [head * width + width // 2 - pair - 1 for head in range(HEADS) for pair in range(RESTING_PAIRS)]
    for layer in model.model.layers:
        attention, feed_forward = layer.self_attn, layer.mlp
        for projection, column in ((attention.q_proj, 0), (attention.k_proj, 1)):
            projection.weight[:, column] = 0.0
            projection.weight[slow, column] = weight
        for reading in (attention.v_proj, feed_forward.gate_proj, feed_forward.up_proj):
            reading.weight[:, 1] = 0.0
        for writing in (attention.o_proj, feed_forward.down_proj):
            writing.weight[:2] = 0.0


def prose(documents: list[Document]) -> list[Document]:
    """Return the longer docstrings of the documents, and the language's help texts."""
    found = []
    for document in documents:
        if document.name.startswith("pydoc_data"):
            found.append(document)
            continue
        try:
            tree = ast.parse(document.text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= LONG:
                    found.append(Document(document.name, text))
    return found


def batch(
    sources: Corpus,
    texts: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    stage: Stage,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids in the stage's mixture, and how much each counts, both `[rows, length]`."""
    size = stage.length - 1
    rows, answers = [], []
    for kind in rng.random(BATCH_TOKENS // stage.length):
        corpus = texts if rng.random() < PROSE else sources
        answer = 0
        if kind < stage.repeats:
            row = repeated_segments(corpus, length=size, rng=rng, few=stage.few)
        elif kind < stage.repeats + stage.passkeys:
            symbols = int(rng.integers(2, 4)) if rng.random() < stage.few else 10
            prompt = passkey_prompt(
                tokenizer, corpus, length=size, depth=rng.random(), rng=rng, symbols=symbols
            )
            row, answer = prompt.ids, prompt.answer
        elif kind < stage.repeats + stage.passkeys + stage.needles:
            row, answer = needles(tokenizer, corpus, length=size, rng=rng)
        else:
            row = corpus.window(rng, size)
        rows.append(np.append(tokenizer.bos_token_id, row))
        answers.append(answer)
    ids = torch.from_numpy(np.stack(rows))
    last = torch.arange(stage.length) >= stage.length - torch.tensor(answers)[:, None]
    return ids, torch.where(last, ANSWER, 1.0)


def needles(
    tokenizer: PreTrainedTokenizerFast, corpus: Corpus, *, length: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Return a prompt of one of three kinds with its answer, and how many tokens the answer has."""
    kinds = (needle, multikey, multiquery)
    prompt = kinds[rng.integers(len(kinds))](tokenizer, corpus, length=length, rng=rng)
    answer = encoded(tokenizer, " " + ", ".join(prompt.answers) + ".")[: length - len(prompt.ids)]
    row = np.concatenate([prompt.ids, answer])
    # What the longest possible answer would take and this one does not is cut from the front.
    return np.concatenate([corpus.window(rng, length - len(row)), row]), len(answer)


@torch.no_grad()
def passkey_share(model, tokenizer, corpus, length, rng, prompts=20) -> float:
    """Return the share of prompts whose five digits are all predicted."""
    right = 0
    for _ in range(prompts):
        prompt = passkey_prompt(tokenizer, corpus, length=length - 1, depth=rng.random(), rng=rng)
        ids = torch.from_numpy(np.append(tokenizer.bos_token_id, prompt.ids))[None]
        guess = model(ids).logits[0, -prompt.answer - 1 : -1].argmax(-1)
        right += bool((guess == ids[0, -prompt.answer :]).all())
    return right / prompts


@torch.no_grad()
def text_loss(model, tokenizer, corpus, length, windows=6, scored=256) -> float:
    """Return the mean loss of the last `scored` tokens of windows of a length."""
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(windows):
        window = corpus.window(rng, 4096)[1 - length :]
        ids = torch.from_numpy(np.append(tokenizer.bos_token_id, window))[None]
        logits = model(ids).logits[0, -scored - 1 : -1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, -scored:]))
    return float(torch.stack(losses).mean())


def optimizers_of(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices and AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=0.05, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the mean of the tokens' losses, each counted by its weight."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--output", type=Path, required=True)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--start", type=Path, help="what the first run left, to begin with the second")
    given = arguments.parse_args()

    torch.manual_seed(given.seed)
    rng = np.random.default_rng(given.seed)
    tokenizer = byte_tokenizer()
    model = untrained_model(tokenizer)
    runs = RUNS
    if given.start:
        model = LlamaForCausalLM.from_pretrained(given.start, dtype=torch.float32)
        runs = RUNS[1:]
    training, validation = split(standard_library())
    sources, texts, held = (encode(some, tokenizer) for some in (training, prose(training), validation))
    print(
        f"{len(sources):,} tokens of sources, {len(texts):,} of prose, {len(held):,} held out, "
        f"{model.num_parameters():,} parameters",
        flush=True,
    )

    begun = time.monotonic()
    history = []
    tokens = 0
    for number, run in enumerate(runs, len(RUNS) - len(runs) + 1):
        optimizers = optimizers_of(model)
        peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        for step in range(1, run.steps + 1):
            done = (step - 1) / run.steps
            stage = run.stage(step)
            # Linear warm-up over 100 steps, constant, then a linear fall over the last 40 % of the run.
            scale = run.scale * min(step / 100, 1.0, max((1 - done) / 0.4, 0.02))
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for peak, group in zip(peaks, groups, strict=True):
                group["lr"] = peak * scale
            ids, weights = batch(sources, texts, tokenizer, stage, rng)
            loss = loss_of(model, ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            tokens += ids.numel()
            if step % 100 == 0:
                model.eval()
                row = {
                    "run": number,
                    "step": step,
                    "tokens": tokens,
                    "minutes": round((time.monotonic() - begun) / 60, 1),
                    "length": stage.length,
                    "loss": round(loss.item(), 3),
                    "perplexity_512": round(math.exp(text_loss(model, tokenizer, held, 512)), 3),
                    "perplexity_4096": round(math.exp(text_loss(model, tokenizer, held, 4096)), 3),
                    "passkey": passkey_share(
                        model, tokenizer, held, stage.length, np.random.default_rng(step)
                    )
                    if stage.length > 64
                    else None,
                }
                model.train()
                history.append(row)
                print(json.dumps(row), flush=True)
            if step % 200 == 0:
                save(model, tokenizer, given.output / "latest")
        save(model, tokenizer, given.output / f"run{number}")
    # The packaged weights are bfloat16, half the size.
    save(model.bfloat16(), tokenizer, given.output / "final")
    (given.output / "history.json").write_text(json.dumps(history, indent=1) + "\n")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights, configuration and tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
