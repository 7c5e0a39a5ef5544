"""Folders of tiny models of transformers with random weights, as save_pretrained writes them, made offline."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

SIDE = 32
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION |= {"image_size": SIDE, "patch_size": 8}
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = "a photo of the cat dog horse picture number again colours two red Blue GREEN sky fast , . ! ? &".split()  # noqa: SIM905
_OTHERS = ["Zürich's", "\U0001f600\u200d\U0001f525", "l'été", "\u6f22\u5b57", "e\u0301", "12,345.6", "don't", "&amp;"]


def captions(count: int, seed: int = 0) -> list[str]:
    """Captions with capitals, punctuation and emoji, a third of them longer than 64 tokens."""
    draw = random.Random(seed)
    words = [*WORDS, *(word.title() for word in WORDS), *_OTHERS]
    texts = []
    for number in range(count):
        drawn = draw.choices(words, k=draw.randint(0, 92 if number % 3 == 0 else 12))
        texts.append(draw.choice((" ", "  ", "\n")).join(drawn) + draw.choice(("", ".", "!?", " ")))
    return texts


def make_clip(folder: Path, seed: int = 0, **processor: Any) -> Path:
    """A CLIP with open_clip's vocabulary, in the tokenizer of transformers."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    own = SimpleTokenizer()
    vocabulary = {piece: number for piece, number in own.encoder.items() if not piece.endswith("_of_text>")}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    CLIPTokenizer(vocab=vocabulary, merges=[*own.bpe_ranks]).save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessor(**(size | processor)).save_pretrained(folder)
    text = {**_TEXT, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
    torch.manual_seed(seed)
    CLIPModel(CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16)).save_pretrained(folder)
    return folder


def make_siglip(folder: Path, seed: int = 0, **processor: Any) -> Path:
    """A SigLIP with a tokenizer of sentencepiece."""
    import sentencepiece
    from transformers import SiglipTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    lines = iter([text.lower() for text in captions(400, seed=1) if text.strip()])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(folder / "spiece"), vocab_size=120, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    SiglipTokenizer(str(folder / "spiece.model"), model_input_names=["input_ids"]).save_pretrained(folder)
    _save_siglip(folder, 1000, seed, processor)
    return folder


def make_siglip2(folder: Path, seed: int = 0, **processor: Any) -> Path:
    """A SigLIP 2 of one image size: SigLIP's model, bilinear, and the lower-casing tokenizer of Gemma's form."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Siglip2Tokenizer

    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learned = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    learned.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    lines = [text.lower().replace(" ", "\u2581") for text in captions(400, seed=1)]
    learned.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    )
    model = json.loads(learned.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Siglip2Tokenizer(vocab=model["vocab"], merges=merges, add_eos_token=True, padding_side="right")
    tokenizer.save_pretrained(folder)
    _save_siglip(folder, 1000, seed, {"resample": 2} | processor)
    return folder


def _save_siglip(folder: Path, vocab_size: int, seed: int, processor: dict[str, Any]) -> None:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    SiglipImageProcessor(**({"size": {"height": SIDE, "width": SIDE}} | processor)).save_pretrained(folder)
    text = {**_TEXT, "vocab_size": vocab_size, "max_position_embeddings": 64, "projection_size": 32}
    torch.manual_seed(seed)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION))
    with torch.no_grad():
        model.logit_scale.fill_(4.7)
        model.logit_bias.fill_(-12.9)
    model.save_pretrained(folder)


MAKE = {"clip": make_clip, "siglip": make_siglip, "siglip2": make_siglip2}
