"""What a policy thought is no part of its answer: `<think>...</think>` is taken out.

POLAR was fine-tuned on answers and compares with a reference that is one. An output that ends
within its thinking has no answer: what is left is what stood before the thinking, usually nothing,
and that is scored as it is, as an empty answer.
"""

from __future__ import annotations

THINKING = ("remove", "opened", "keep")
OPEN, CLOSE = "<think>", "</think>"


def answer_of(text: str, thinking: str = "remove") -> str:
    """An output without what was thought, and without the white space around what is left.

    An output that holds neither tag comes back as it is, except with "opened".

    Args:
        thinking: "remove" takes thinking out where it is marked: from `<think>` to the next
            `</think>`, or to the end if there is none; and all before a first `</think>` that
            nothing in the output has opened, because the chat template did. "opened" says that the
            chat template always does (DeepSeek-R1, Qwen3-Thinking), so that an output without
            `</think>` is nothing but thinking. "keep" changes nothing.
    """
    if thinking == "keep":
        return text
    before, closed, _ = text.partition(CLOSE)
    if thinking == "opened" or (closed and OPEN not in before):
        text = OPEN + text
    if OPEN not in text:
        return text
    before, *blocks = text.split(OPEN)
    return "".join([before, *(block.partition(CLOSE)[2] for block in blocks)]).strip()
