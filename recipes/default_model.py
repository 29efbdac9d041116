"""Train the default model: a byte-level Llama of 3.3 M parameters with a context of 512 tokens.

Text: the standard library's own sources and docstrings (held-out modules excluded), with windows of repeated
random segments and passkey prompts mixed in. Lengths grow 64, 128, 256, 512. Run from the repository's root:

    python recipes/default_model.py --output runs/base --minutes 60
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longspan.text.corpus import Corpus
from longspan.text.documents import held_out, standard_library
from longspan.text.passkey import passkey_prompt
from longspan.text.repeats import repeated_segments

END = "<|endoftext|>"
PAD = "<|pad|>"
CONTEXT = 512
# (share of the run, length, share of repeated segments, share of passkey prompts)
STAGES = [
    (0.12, 64, 0.50, 0.00),
    (0.15, 128, 0.40, 0.10),
    (0.18, 256, 0.25, 0.15),
    (0.55, 512, 0.20, 0.15),
]
BATCH_TOKENS = 8192


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the 256 bytes, a separator and a padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
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
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batch(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    stage: tuple[float, int, float, float],
    rng: np.random.Generator,
) -> torch.Tensor:
    """Return token ids `[rows, length]` in the stage's mixture."""
    _, length, repeats, passkeys = stage
    rows = []
    for kind in rng.random(BATCH_TOKENS // length):
        if kind < repeats:
            rows.append(repeated_segments(corpus, length=length, rng=rng))
        elif kind < repeats + passkeys:
            prompt = passkey_prompt(tokenizer, corpus, length=length, depth=rng.random(), rng=rng)
            rows.append(prompt.ids)
        else:
            rows.append(corpus.window(rng, length))
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def passkey_share(model, tokenizer, corpus, length, rng, prompts=40) -> float:
    """Return the share of prompts whose five digits are all predicted."""
    right = 0
    for _ in range(prompts):
        prompt = passkey_prompt(tokenizer, corpus, length=length, depth=rng.random(), rng=rng)
        ids = torch.from_numpy(prompt.ids)[None]
        guess = model(ids).logits[0, -prompt.answer - 1 : -1].argmax(-1)
        right += bool((guess == ids[0, -prompt.answer :]).all())
    return right / prompts


@torch.no_grad()
def text_loss(model, corpus, length, scored, windows=24) -> float:
    """Return the mean loss of the last `scored` tokens of windows of a length."""
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(windows):
        ids = torch.from_numpy(corpus.window(rng, 4096)[-length:])[None]
        logits = model(ids).logits[0, -scored - 1 : -1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, -scored:]))
    return float(torch.stack(losses).mean())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--output", type=Path, required=True)
    arguments.add_argument("--minutes", type=float, default=60)
    arguments.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    arguments.add_argument("--rate", type=float, default=0.02, help="peak rate of the matrices")
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()

    torch.manual_seed(given.seed)
    rng = np.random.default_rng(given.seed)
    tokenizer = byte_tokenizer()
    model = untrained_model(tokenizer)
    documents = standard_library()
    encode = lambda kept: Corpus.from_ids(
        (tokenizer(document.text)["input_ids"] for document in documents if held_out(document) == kept),
        separator=tokenizer.eos_token_id,
    )
    train, validation = encode(False), encode(True)
    print(f"{len(train):,} training tokens, {len(validation):,} held out, {model.num_parameters():,} parameters")

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    if given.optimizer == "muon":
        optimizers = [
            torch.optim.Muon(matrices, lr=given.rate, momentum=0.95, weight_decay=0.05),
            torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
        ]
    else:
        optimizers = [torch.optim.AdamW(matrices + others, lr=given.rate, betas=(0.9, 0.95), weight_decay=0.1)]
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    begun = time.monotonic()
    history = []
    step = tokens = 0
    while (done := (time.monotonic() - begun) / (60 * given.minutes)) < 1:
        stage, reached = STAGES[-1], 0.0
        for candidate in STAGES:
            reached += candidate[0]
            if done < reached:
                stage = candidate
                break
        # Linear warm-up over 100 steps, constant, then a linear fall over the last 40 % of the run.
        scale = min((step + 1) / 100, 1.0, max((1 - done) / 0.4, 0.02))
        for peak, optimizer in zip(peaks, optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        ids = batch(train, tokenizer, stage, rng)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + ids.numel()
        if step % 100 == 0:
            model.eval()
            row = {
                "step": step,
                "tokens": tokens,
                "minutes": round((time.monotonic() - begun) / 60, 1),
                "length": stage[1],
                "loss": round(loss.item(), 3),
                "perplexity_512": round(math.exp(text_loss(model, validation, 512, 128)), 3),
                "perplexity_4096": round(math.exp(text_loss(model, validation, 4096, 128, 4)), 3),
                "passkey": passkey_share(model, tokenizer, validation, stage[1], rng) if stage[1] > 64 else None,
            }
            model.train()
            history.append(row)
            print(json.dumps(row), flush=True)
        if step % 500 == 0:
            model.save_pretrained(given.output / "latest")
            tokenizer.save_pretrained(given.output / "latest")
    model.save_pretrained(given.output / "float32")
    tokenizer.save_pretrained(given.output / "float32")
    (given.output / "history.json").write_text(json.dumps(history, indent=1) + "\n")


if __name__ == "__main__":
    main()
