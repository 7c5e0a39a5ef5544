"""Folders of tiny open_clip teachers, one for each kind of text tower that open_clip's configs have, made offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import TINY_MODEL, make_model_folder
from tests.pipeline.models.transformers_folders import captions

_SIGLIP = {"context_length": 64, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
_SIGLIP |= {"tokenizer_kwargs": {"clean": "canonicalize"}}
_CLIPA = {"context_length": 32, "no_causal_mask": True, "pool_type": "last"}
_CLIPA |= {"tokenizer_kwargs": {"strip_sep_token": True}}
_OWN = {"custom_text": True}
_BIAS = {"custom_text": True, "init_logit_bias": -10, "init_logit_scale": 4.7}
_COCA = {
    **_OWN,
    "vision_cfg": {**TINY_MODEL["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "multimodal_cfg": {"width": 16, "heads": 2, "layers": 1, "attn_pooler_heads": 2, "context_length": 76},
}
_HF = {"hf_pooler_type": "mean_pooler"}
# what the configs of open_clip 3.3 add to CLIP's: settings of the text tower, its tokenizer, settings of the model
KINDS: dict[str, tuple[dict[str, Any], str | None, dict[str, Any]]] = {
    "CLIP": ({"context_length": 77}, None, {}),
    "MobileCLIP, not causal": ({"context_length": 77, "no_causal_mask": True}, None, _OWN),
    "PE, short": ({"context_length": 32}, None, _OWN),
    "SigLIP, unigram": (_SIGLIP, "unigram", _BIAS),
    "SigLIP 2, byte pairs": (_SIGLIP, "byte pairs", _BIAS),
    "SigLIP, no projection": ({**_SIGLIP, "proj_bias": False, "proj_type": "none", "width": 16}, "unigram", _BIAS),
    "CLIPA, stripped separator": (_CLIPA, "words", {}),
    "worldwide, end token": ({"context_length": 77, "pool_type": "eos", "eos_id": 1}, "unigram", {}),
    "first position": ({"context_length": 77, "pool_type": "first", "no_causal_mask": True}, "words", {}),
    "RoBERTa": ({**_HF, "hf_model_name": "roberta"}, "words", {}),
    "CoCa": ({"context_length": 76, "embed_cls": True, "output_tokens": True}, None, _COCA),
    "class token, padding hidden": ({"context_length": 40, "embed_cls": True, "pad_id": 0}, None, _OWN),
    "mT5": ({**_HF, "hf_model_name": "mt5", "hf_proj_type": "mlp"}, "unigram", {}),
}


def make_tokenizer(kind: str, folder: Path) -> int:
    """Save a tokenizer of transformers that has learned from other captions; return the size of its vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "</s>", "<unk>", "[CLS]", "[SEP]"]
    model, trainer, before = {
        "words": (
            models.WordLevel(unk_token="<unk>"),
            trainers.WordLevelTrainer(vocab_size=60, special_tokens=specials),
            pre_tokenizers.BertPreTokenizer(),
        ),
        "unigram": (
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False),
            pre_tokenizers.Metaspace(),
        ),
        "byte pairs": (
            models.BPE(),
            trainers.BpeTrainer(
                vocab_size=600,
                special_tokens=specials,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ),
    }[kind]
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = before
    if kind == "words":
        tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.train_from_iterator(captions(400, seed=1), trainer)
    around = ("[CLS] $A [SEP]", [("[CLS]", 3), ("[SEP]", 4)]) if kind == "words" else ("$A </s>", [("</s>", 1)])
    tokenizer.post_processor = processors.TemplateProcessing(single=around[0], special_tokens=around[1])
    names = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def make_text_model(kind: str, folder: Path, vocab_size: int) -> str:
    """Save the config of a tiny text model of transformers, which open_clip builds its tower from."""
    from transformers import MT5Config, RobertaConfig

    config = {
        "roberta": lambda: RobertaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=514,
            pad_token_id=0,
        ),
        "mt5": lambda: MT5Config(vocab_size=vocab_size, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2),
    }[kind]()
    config.save_pretrained(folder)
    return str(folder)


def make_teacher(kind: str, folder: Path) -> Path:
    text, tokenizer, model = KINDS[kind]
    text = {**({} if "hf_model_name" in text else TINY_MODEL["text_cfg"]), **text}
    if tokenizer is not None:
        size = make_tokenizer(tokenizer, folder / "tokenizer")
        text["hf_tokenizer_name"] = "its own folder"
        if "hf_model_name" in text:
            text["hf_model_name"] = make_text_model(text["hf_model_name"], folder / "text", size)
        else:
            text["vocab_size"] = size
    made = make_model_folder(folder / "model", text_cfg=text, **model)
    for file in (folder / "tokenizer").glob("*"):
        file.rename(made / file.name)
    return made
