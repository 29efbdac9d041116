"""Train the default model: a byte-level Llama of 3.3 M parameters with a context of 512 tokens.

Text: the standard library's own sources, its longer docstrings and help texts once more as prose (held-out modules
excluded), with windows of repeated random segments and passkey prompts mixed in. Lengths grow 64, 128, 256, 512.
Every window begins with the end-of-text token, as the tokenizer puts it in front. Run from the repository's root:

    python recipes/default_model.py --output runs/base
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longspan.text.corpus import Corpus
from longspan.text.documents import Document, split, standard_library
from longspan.text.encoding import encode
from longspan.text.passkey import passkey_prompt
from longspan.text.repeats import repeated_segments

END = "<|endoftext|>"
PAD = "<|pad|>"
CONTEXT = 512
# (share of the run, length, share of repeated segments, share of passkey prompts)
STAGES = [
    (0.15, 64, 0.50, 0.00),
    (0.15, 128, 0.40, 0.10),
    (0.20, 256, 0.25, 0.15),
    (0.38, 512, 0.20, 0.15),
    (0.12, 512, 0.60, 0.12),
]
BATCH_TOKENS = 8192
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
    """Return the architecture with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


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
    stage: tuple[float, int, float, float],
    rng: np.random.Generator,
) -> torch.Tensor:
    """Return token ids `[rows, length]` in the stage's mixture."""
    _, length, repeats, passkeys = stage
    rows = []
    for kind in rng.random(BATCH_TOKENS // length):
        corpus = texts if rng.random() < PROSE else sources
        if kind < repeats:
            row = repeated_segments(corpus, length=length - 1, rng=rng)
        elif kind < repeats + passkeys:
            row = passkey_prompt(tokenizer, corpus, length=length - 1, depth=rng.random(), rng=rng).ids
        else:
            row = corpus.window(rng, length - 1)
        rows.append(np.append(tokenizer.bos_token_id, row))
    return torch.from_numpy(np.stack(rows))


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


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--output", type=Path, required=True)
    arguments.add_argument("--steps", type=int, default=1600)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()

    torch.manual_seed(given.seed)
    rng = np.random.default_rng(given.seed)
    tokenizer = byte_tokenizer()
    model = untrained_model(tokenizer)
    training, validation = split(standard_library())
    sources, texts, held = (encode(some, tokenizer) for some in (training, prose(training), validation))
    print(
        f"{len(sources):,} tokens of sources, {len(texts):,} of prose, {len(held):,} held out, "
        f"{model.num_parameters():,} parameters",
        flush=True,
    )

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.05, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    begun = time.monotonic()
    history = []
    tokens = 0
    for step in range(1, given.steps + 1):
        done = (step - 1) / given.steps
        stage, reached = STAGES[-1], 0.0
        for candidate in STAGES:
            reached += candidate[0]
            if done < reached:
                stage = candidate
                break
        # Linear warm-up over 100 steps, constant, then a linear fall over the last 40 % of the run.
        scale = min(step / 100, 1.0, max((1 - done) / 0.4, 0.02))
        for peak, optimizer in zip(peaks, optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        ids = batch(sources, texts, tokenizer, stage, rng)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += ids.numel()
        if step % 100 == 0:
            model.eval()
            row = {
                "step": step,
                "tokens": tokens,
                "minutes": round((time.monotonic() - begun) / 60, 1),
                "length": stage[1],
                "loss": round(loss.item(), 3),
                "perplexity_512": round(math.exp(text_loss(model, tokenizer, held, 512)), 3),
                "perplexity_4096": round(math.exp(text_loss(model, tokenizer, held, 4096)), 3),
                "passkey": passkey_share(model, tokenizer, held, stage[1], rng) if stage[1] > 64 else None,
            }
            model.train()
            history.append(row)
            print(json.dumps(row), flush=True)
        if step % 200 == 0:
            model.save_pretrained(given.output / "latest")
            tokenizer.save_pretrained(given.output / "latest")
    # The packaged weights are bfloat16, half the size.
    model.bfloat16().save_pretrained(given.output / "final")
    tokenizer.save_pretrained(given.output / "final")
    (given.output / "history.json").write_text(json.dumps(history, indent=1) + "\n")


if __name__ == "__main__":
    main()
